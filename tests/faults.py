"""Runs in separate processes, with injected faults.

The processes are forked from a single-threaded server that has imported everything (`warm.py`), so each starts in milliseconds.
"""

import ctypes
import dataclasses
import gc
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from tilewright.cli import main
from tilewright.train import PRESETS, opening, run, train
from tilewright.train.callbacks.checkpoints import Checkpoints
from tilewright.train.callbacks.garbage import GarbageCollection
from tilewright.train.checkpoint import writer as checkpoint_writer
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.guard import Guard
from tilewright.train.metrics import read_metrics
from tilewright.train.signals import StopRequest
from tilewright.train.trainer import Trainer, TrainingLoss

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["warm"])

# Fields of a row of metrics that are deterministic; the other fields are times.
EXACT = ("step", "loss", "grad_norm", "lr", "valid_loss", "skipped_steps")


def rows(run):
    return [{name: row[name] for name in EXACT if name in row} for row in read_metrics(run)]


def outcome(run):
    """Return everything that must be bit-equal between two runs: the metrics, and the file hashes of the last checkpoint."""
    return rows(run), json.loads((list_checkpoints(run)[-1] / "manifest.json").read_text())["files"]


def run_in_child(target: Callable, *arguments) -> tuple[int, str]:
    """Run `target` in a process; return its exit status (negative for a signal) and its output."""
    (ended,) = run_in_children(target, [arguments])
    return ended


def run_in_children(target: Callable, arguments: Iterable[tuple]) -> list[tuple[int, str]]:
    """Run one concurrent process per tuple of arguments; return the results of `run_in_child` for each."""
    # In Python 3.11 the server takes sys.path only from the environment (gh-126631).
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    children = []
    try:
        for of_child in arguments:
            # A pipe, because a limit on the file size would also apply to an output file.
            reader, writer = _SERVER.Pipe(duplex=False)
            children.append((_SERVER.Process(target=_enter, args=(writer, target, of_child)), reader))
            children[-1][0].start()
            writer.close()
        return [_ended(*child) for child in children]
    finally:
        # Also after a timeout of the test.
        for process, _ in children:
            if process.is_alive():
                process.kill()


def _ended(process: BaseProcess, reader: Connection) -> tuple[int, str]:
    printed = b""
    while piece := os.read(reader.fileno(), 1 << 16):
        printed += piece
    process.join()
    return process.exitcode, printed.decode()


def _enter(writer: Connection, target: Callable, arguments: tuple) -> None:
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    writer.close()
    torch.set_num_threads(1)
    # Exclude the server's imports from garbage collection.
    gc.freeze()
    target(*arguments)


def program(path: Path, environment: Mapping[str, str], *arguments: str) -> None:
    """Run a Python file as a main program."""
    os.environ.update(environment)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


class FileOperations:
    """Count the file operations of this process below a folder, and kill the process at one of them.

    The kill comes `delay` seconds after the start of operation `kill_at`, and at most `MOST_LATER` operations later.
    """

    MOST_LATER = 20

    _NAMES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def __init__(self, folder: Path, kill_at: int | None = None, delay: float = 0.0) -> None:
        # `next` of a count is atomic; checkpoints are written in another thread.
        self._numbers = itertools.count()
        self._folder, self._delay = str(folder), delay
        self._kill_at = math.inf if kill_at is None else kill_at
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event not in self._NAMES or not self._concerns(event, arguments):
            return
        number = next(self._numbers)
        if number == self._kill_at and self._delay:
            threading.Timer(self._delay, _kill).start()
        elif number == self._kill_at or number >= self._kill_at + self.MOST_LATER:
            _kill()

    def count(self) -> int:
        """Return the number of operations; call once, at the end."""
        return next(self._numbers)

    def _concerns(self, event: str, arguments: tuple) -> bool:
        path = arguments[0]
        if isinstance(path, int):
            return False
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        # shutil.rmtree uses paths relative to a folder descriptor.
        return os.fsdecode(path).startswith(self._folder) or not os.path.isabs(path)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def skip_drawing():
    """Save plots without drawing them, which would take most of the time."""
    Figure.savefig = lambda self, file, **_: file.write(b"a curve")


def train_until_killed(config, kill_at=None, delay=0.0, extend=None):
    """Train or resume; print the number of file operations."""
    skip_drawing()
    operations = FileOperations(config.out, kill_at, delay)
    train(config, resume="auto", extend=extend)
    print(f"operations {operations.count()}")


def command(config, *options):
    """Run `tilewright train` with `config` as a preset."""
    skip_drawing()
    PRESETS["tiny"] = config
    sys.exit(main(["train", "tiny", *options]))


def before(owner, name, action, when=lambda *arguments: True):
    """Call `action` before each call of `owner.name` for whose arguments `when` is true."""
    function = getattr(owner, name)

    def wrapped(*arguments, **options):
        if when(*arguments):
            action()
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


# Phases of a run in which a signal arrives.
PHASES = {
    "beginning": lambda action: before(opening, "begin_run", action),
    "between steps": lambda action: before(GarbageCollection, "after_step", action, lambda self: self.trainer.step == 6),
    "in a step": lambda action: before(Guard, "judge", action, lambda self, *_: self.taken == 5),
    "validating": lambda action: before(TrainingLoss, "forward", action, lambda *_: not torch.is_grad_enabled()),
    "validating last": lambda action: before(Trainer, "_validate", action, lambda self, *_: self.step == 12),
    "saving": lambda action: before(
        checkpoint_writer, "write_manifest", action, lambda folder, *_: "step-00000004" in str(folder)
    ),
}


def command_with_signals(config, phase, numbers):
    """Run the command; send the signals one after the other, once, in the given phase."""
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
            # Wait for the handler, because pending signals of the same number merge into one.
            received.wait()

    StopRequest._receive = note
    PHASES[phase](send)
    command(config, "--resume", "auto")


# When the disk fills up, and the file size limit from then on.
FULL = {
    "the folder is made": lambda limit: limit(0),
    "the first checkpoint is saved": lambda limit: limit(100_000),
    "the configuration is written": lambda limit: before(opening, "begin_run", lambda: limit(0)),
    "metrics are written": lambda limit: before(Guard, "judge", lambda: limit(0), lambda self, *_: self.taken == 5),
    "a checkpoint is saved": lambda limit: before(Guard, "judge", lambda: limit(100_000), lambda self, *_: self.taken == 5),
    "the curve is drawn": lambda limit: before(run, "plot_losses", lambda: limit(0)),
}


def command_on_a_full_disk(config, when, *options):
    """Run the command; from `when` on, writes beyond a file size limit fail as on a full disk."""
    FULL[when](lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))
    command(config, *options)


def command_without_privileges(config, *options):
    """Run the command without root's capability to bypass file permissions."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        # struct __user_cap_header_struct of version 3, and two of __user_cap_data_struct: no capabilities.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if libc.capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")
    command(config, *options)


def command_in_a_folder_that_gets_read_only(config):
    """Run the command; the folder of checkpoints becomes read-only before the checkpoint of step 8."""

    def about_to_save(self):
        self.writer.wait()
        return self.trainer.step == 8

    before(Checkpoints, "_save", lambda: (config.out / "checkpoints").chmod(0o555), about_to_save)
    command_without_privileges(config)


# A compiler that waits for a file before it compiles a kernel.
COMPILER = """#!/bin/sh
case "$*" in *.main.cpp*)
    touch "$0.began"
    until [ -e "$0.goes-on" ]; do sleep 0.02; done
esac
exec {} "$@"
"""


def command_while_it_compiles(config, number, whole_group, folder):
    """Run the command with torch.compile; send the signal while the first compiler runs, optionally to that process too."""
    from torch._inductor import config as inductor

    os.setsid()
    folder.mkdir(exist_ok=True)
    # The same name as the real compiler, so that Inductor reuses precompiled headers.
    compiler, began, goes_on = (folder / name for name in ("g++", "g++.began", "g++.goes-on"))
    compiler.write_text(COMPILER.format(shutil.which("g++")))
    compiler.chmod(0o755)
    for mark in (began, goes_on):
        mark.unlink(missing_ok=True)
    inductor.cpp.cxx = (None, "g++")
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")

    def send():
        while not began.exists():
            time.sleep(0.01)
        (os.killpg if whole_group else os.kill)(os.getpid(), number)
        goes_on.touch()

    threading.Thread(target=send, daemon=True).start()
    command(dataclasses.replace(config, compile=True), "--resume", "auto")
