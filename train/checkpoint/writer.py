"""Asynchronous checkpoint writer: `save` copies the tensors to the CPU, and a thread hashes and writes them."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ...errors import UserError
from ...files import atomic_folder, make_folder, remove_folder
from ..metrics import sync_metrics
from .formats import FORMAT, MANIFEST_FILE, STATE_FILE
from .layout import FOLDER_NAME, Tensors, checkpoint_step, free_folder, list_checkpoints
from .reader import read_state
from .tensor_files import FileRecord, dtype_name, write_bytes, write_tensors

Copies = dict[str, dict[str, Tensor]]


class Snapshots:
    """Copies tensors to CPU buffers that it reuses for the next copies."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, tensors: Tensors) -> tuple[Copies, Callable[[], None]]:
        """Return contiguous copies, and a function that waits for them. Call it before you read the copies.

        The copies are valid until the next call. Copies from a GPU are asynchronous and ordered on the current stream: work
        launched later on that stream cannot change them.
        """
        buffers: dict[tuple[str, str], Tensor] = {}
        devices = set()
        for group, named in tensors.items():
            for name, tensor in named.items():
                dtype_name(f"{group} {name}", tensor.dtype)
                buffer = self._buffers.get((group, name))
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[group, name] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    devices.add(tensor.device)
        self._buffers = buffers
        events = [torch.cuda.current_stream(device).record_event() for device in devices]

        def finish() -> None:
            for event in events:
                event.synchronize()

        return {group: {name: buffers[group, name] for name in named} for group, named in tensors.items()}, finish


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, and removes old ones. A context manager.

    Keeps the newest `keep` checkpoints, the checkpoint of `keep_step`, and the newest with the lowest validation loss. Does not
    touch damaged checkpoints of earlier steps or any checkpoint of a later step. Flushes the metrics to disk before it
    publishes a checkpoint. Holds a lock on the folder: a second process that opens a writer for it gets a `UserError`.
    """

    def __init__(self, run: Path, keep: int, keep_step: int | None = None) -> None:
        self._run = run
        self._keep, self._keep_step = keep, keep_step
        self._snapshots = Snapshots()
        # Set unless a save is being written.
        self._written = threading.Event()
        self._written.set()
        self._failure: Exception | None = None
        self._lock = self._open()

    def _open(self) -> int | None:
        return _lock(self._run / FOLDER_NAME)

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], valid_loss: float | None = None) -> None:
        """Copy the tensors to the CPU and return. A thread writes them, with the step, the loss and `state` (JSON types).

        Waits for the previous save first. If that save failed, raises its error as `wait` does and saves nothing. Keeps the
        CPU buffers, pinned for tensors on a GPU, for the next save.
        """
        self.wait()
        if valid_loss is not None and not math.isfinite(valid_loss):
            valid_loss = None
        content = json.dumps({**state, "step": step, "valid_loss": valid_loss}, separators=(",", ":")).encode()
        self._save(step, tensors, content)

    def _save(self, step: int, tensors: Tensors, state: bytes) -> None:
        copies, finish_copies = self._snapshots.take(tensors)

        def write() -> None:
            finish_copies()
            self._write(step, copies, state)

        self._start(step, write)

    def _start(self, step: int, write: Callable[[], None]) -> None:
        def run() -> None:
            try:
                write()
            except OSError as error:
                what = f"cannot save the checkpoint of step {step} in {self._run / FOLDER_NAME}"
                self._failure = UserError(f"{what}: {error}; {self._recovery_hint()}")
                self._failure.__cause__ = error
            except Exception as error:
                self._failure = error
            finally:
                self._written.set()

        try:
            self._written.clear()
            threading.Thread(target=run, name="checkpoint", daemon=True).start()
        except BaseException:
            # No thread runs that would set it.
            self._written.set()
            raise

    def _recovery_hint(self) -> str:
        names = [folder.name for folder in list_checkpoints(self._run)]
        if not names:
            return "the run has no earlier checkpoint"
        aside = sorted(path.name for path in (self._run / FOLDER_NAME).glob("set-aside-*"))
        unneeded = [*aside, *names[:-1]]
        # The writer removes an old checkpoint only after it has written the new one.
        space = f"you can delete {', '.join(unneeded)}" if unneeded else "free disk space for a second checkpoint"
        return f"--resume auto continues from {names[-1]}; {space}"

    def wait(self) -> None:
        """Wait until the last save is on disk. If it failed, raise its error once, as a `UserError` for an `OSError`."""
        # An event, because Ctrl-C during Thread.join marks a running thread as ended (Python 3.11 and 3.12).
        self._written.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def _write(self, step: int, copies: Copies, state: bytes) -> None:
        remove_leftovers(self._run)
        folder = free_folder(self._run, step)
        with atomic_folder(folder) as temporary:
            files = {f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", t) for name, t in copies.items()}
            write_manifest(temporary, files, state)
            sync_metrics(self._run)
        remove_unwanted(self._run, folder, self._keep, self._keep_step)


def write_manifest(folder: Path, files: dict[str, FileRecord], state: bytes) -> None:
    """Complete a checkpoint: write its state, then the manifest of all its files."""
    files = {**files, STATE_FILE: write_bytes(folder / STATE_FILE, state)}
    write_bytes(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, "files": files}, separators=(",", ":")).encode())


def remove_leftovers(run: Path) -> None:
    """Remove the temporary folders of killed saves and removals. Raises an `OSError` if the checkpoint folder is missing."""
    for path in (run / FOLDER_NAME).iterdir():
        if path.name.startswith(".step-") and path.name.endswith(".tmp"):
            shutil.rmtree(path, ignore_errors=True)


def remove_unwanted(run: Path, newest: Path, keep: int, keep_step: int | None) -> None:
    """Remove the checkpoints that `CheckpointWriter` does not keep after it has written `newest`."""
    step = checkpoint_step(newest)
    losses: dict[Path, float | None] = {}
    for folder in list_checkpoints(run):
        if folder != newest and checkpoint_step(folder) == step:
            remove_folder(folder)
        elif checkpoint_step(folder) <= step:
            with contextlib.suppress(UserError):
                losses[folder] = read_state(folder)["valid_loss"]
    validated = {folder: loss for folder, loss in losses.items() if loss is not None}
    kept = {newest, *list(losses)[-keep:], *(folder for folder in losses if checkpoint_step(folder) == keep_step)}
    if validated:
        kept.add(min(reversed(validated), key=validated.__getitem__))
    for folder in losses.keys() - kept:
        remove_folder(folder)


def _lock(folder: Path) -> int:
    try:
        make_folder(folder)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose a folder for checkpoints that is writable"
        ) from error
    try:
        # A POSIX lock belongs to this process: a child that outlives it does not hold it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise UserError(
            f"cannot lock {folder}: another process saves checkpoints there; stop it, or use another folder"
        ) from None
    except OSError:
        pass  # The file system does not support locks.
    return descriptor
