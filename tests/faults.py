"""Runs in processes of their own, which faults may befall.

They are forked from a server that has imported everything and has no threads, so that each costs milliseconds.
"""

import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from matplotlib.figure import Figure

from tilewright.cli import main
from tilewright.train import PRESETS, loop, train
from tilewright.train.checkpoint import writer as checkpoint_writer
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.guard import Guard
from tilewright.train.metrics import read_metrics
from tilewright.train.signals import StopRequest
from tilewright.train.trainer import Trainer, TrainingLoss

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["tilewright.cli", "tilewright.train.command", "matplotlib.figure", "matplotlib.backends.backend_agg"]
)
_TIMEOUT = 120

# The rest of a row is time.
EXACT = ("step", "loss", "grad_norm", "lr", "valid_loss", "skipped_steps")


def rows(run):
    return [{name: row[name] for name in EXACT if name in row} for row in read_metrics(run)]


def outcome(run):
    """Return all that has to be bit-equal between two runs: the metrics, and the hashes of the last checkpoint's files."""
    return rows(run), json.loads((list_checkpoints(run)[-1] / "manifest.json").read_text())["files"]


def run_in_child(target: Callable, *arguments) -> tuple[int, str]:
    """Return the exit status, below zero for a signal, and what was printed."""
    # A pipe, because a file has a length, which a limit may concern.
    reader, writer = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_enter, args=(writer, target, arguments))
    process.start()
    writer.close()
    printed = b""
    while reader.poll(_TIMEOUT) and (piece := os.read(reader.fileno(), 1 << 16)):
        printed += piece
    process.join(_TIMEOUT)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
        raise TimeoutError(printed.decode())
    return status, printed.decode()


def _enter(writer: Connection, target: Callable, arguments: tuple) -> None:
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    writer.close()
    torch.set_num_threads(1)
    # What the server imported is never looked at again.
    gc.freeze()
    target(*arguments)


class FileOperations:
    """Counts what this process does to files below a folder, and kills it `delay` seconds after it begins number `kill_at`."""

    _NAMES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def __init__(self, folder: Path, kill_at: int | None = None, delay: float = 0.0) -> None:
        self.count = 0
        self._folder, self._kill_at, self._delay = str(folder), kill_at, delay
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event not in self._NAMES or not self._concerns(event, arguments):
            return
        self.count += 1
        if self.count - 1 == self._kill_at:
            if not self._delay:
                _kill()
            threading.Timer(self._delay, _kill).start()

    def _concerns(self, event: str, arguments: tuple) -> bool:
        path = arguments[0]
        if isinstance(path, int):
            return False
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        # Trees are removed relative to a descriptor of their folder.
        return os.fsdecode(path).startswith(self._folder) or not os.path.isabs(path)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(config, kill_at=None, delay=0.0):
    """Train, or go on; print how many operations on files it took."""
    # What the curve looks like costs most of the time, and is not the matter.
    Figure.savefig = lambda self, file, **_: file.write(b"a curve")
    operations = FileOperations(config.out, kill_at, delay)
    train(config, resume="auto")
    print(f"operations {operations.count}")


def command(config, *options):
    """Run `tilewright train` with a preset that is `config`."""
    PRESETS["tiny"] = config
    sys.exit(main(["train", "tiny", *options]))


def before(owner, name, action, when=lambda *arguments: True):
    """Let `action` come first wherever `owner.name` is called with arguments of which `when` is true."""
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        if when(*arguments):
            action()
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


# Where a signal may find a run.
PHASES = {
    "beginning": lambda action: before(loop, "begin_run", action),
    "between steps": lambda action: before(loop._Loop, "_after_step", action, lambda self, *_: self.trainer.step == 6),
    "in a step": lambda action: before(Guard, "judge", action, lambda self, *_: self.taken == 5),
    "validating": lambda action: before(TrainingLoss, "forward", action, lambda *_: not torch.is_grad_enabled()),
    "validating last": lambda action: before(Trainer, "_validate", action, lambda self, *_: self.step == 12),
    "saving": lambda action: before(
        checkpoint_writer, "write_manifest", action, lambda folder, *_: "step-00000004" in str(folder)
    ),
}


def command_with_signals(config, phase, numbers):
    """Run the command; the signals come one after the other, once, where `phase` says."""
    left, received = list(numbers), threading.Event()
    receive = StopRequest._receive

    def note(*arguments):
        try:
            receive(*arguments)
        finally:
            received.set()

    def send():
        while left:
            received.clear()
            os.kill(os.getpid(), left.pop(0))
            # From another thread: two that are pending are as one.
            assert received.wait(_TIMEOUT)

    StopRequest._receive = note
    PHASES[phase](send)
    command(config, "--resume", "auto")


# When a disk gets full, and how long files may still become.
FULL = {
    "the folder is made": lambda limit: limit(0),
    "the first checkpoint is saved": lambda limit: limit(100_000),
    "the configuration is written": lambda limit: before(loop, "begin_run", lambda: limit(0)),
    "metrics are written": lambda limit: before(Guard, "judge", lambda: limit(0), lambda self, *_: self.taken == 5),
    "a checkpoint is saved": lambda limit: before(Guard, "judge", lambda: limit(100_000), lambda self, *_: self.taken == 5),
    "the curve is drawn": lambda limit: before(loop, "plot_losses", lambda: limit(0)),
}


def command_on_a_full_disk(config, when, *options):
    """Run the command; from the moment `when` on, no file may grow beyond a limit, which fails as a full disk does."""
    FULL[when](lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))
    command(config, *options)


def command_without_privileges(config, *options):
    """Run the command as a user whom the modes of files bind, which they do not bind root."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        # struct __user_cap_header_struct of version 3, and two of __user_cap_data_struct: no capability at all.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if libc.capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")
    command(config, *options)


def command_in_a_folder_that_gets_read_only(config):
    """Run the command; before the checkpoint of step 8 their folder becomes read-only."""

    def about_to_save(self):
        self.writer.wait()
        return self.trainer.step == 8

    before(loop._Loop, "_save", lambda: (config.out / "checkpoints").chmod(0o555), about_to_save)
    command_without_privileges(config)


def command_while_it_compiles(config, number, whole_group, cache):
    """Run the command, compiled; the signal comes as the first kernel is compiled, to the compiler's processes too or not."""
    os.setsid()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    sent = threading.Event()

    def send():
        (os.killpg if whole_group else os.kill)(os.getpid(), number)

    def hear(event, arguments):
        if event == "subprocess.Popen" and any(str(word).endswith(".main.cpp") for word in arguments[1]) and not sent.is_set():
            sent.set()
            # Once the compiler is at work.
            threading.Timer(0.2, send).start()

    sys.addaudithook(hear)
    command(dataclasses.replace(config, compile=True), "--resume", "auto")
