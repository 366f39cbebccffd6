"""Checkpoints written while training goes on: copied to the CPU at once, hashed and written by a thread."""

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
    """Copies of tensors on the CPU, in memory that the next copies use again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, tensors: Tensors) -> tuple[Copies, Callable[[], None]]:
        """Return contiguous copies, valid until the next call, and what to call before they are read.

        Tensors on a GPU are copied in the order of the current stream: whatever it does next cannot change the copies, and
        nothing waits for them here.
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
    """Writes the checkpoints of a run, one at a time, and removes those that are no longer wanted; a context manager.

    The newest `keep` stay, that of `keep_step`, and the one with the lowest validation loss, of equals the newest. Damaged ones
    of earlier steps and whatever is of later steps are left alone. Metrics logged before a save are on disk before its
    checkpoint is. While it is open, another process that would save checkpoints of the run is refused.
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
        """Copy the tensors to the CPU and return; a thread writes them, and the state, of JSON's types, with its step and loss.

        Waits first for the save before this one, and raises its failure as `wait` does; then nothing is saved. The memory of
        the copies, pinned for tensors on a GPU, is kept for the next save.
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
                what = f"saving the checkpoint of step {step} in {self._run / FOLDER_NAME} failed ({error})"
                self._failure = UserError(f"{what}: {self._what_remains()}")
                self._failure.__cause__ = error
            except Exception as error:
                self._failure = error
            finally:
                self._written.set()

        try:
            self._written.clear()
            threading.Thread(target=run, name="checkpoint", daemon=True).start()
        except BaseException:
            # Without a thread nobody else would.
            self._written.set()
            raise

    def _what_remains(self) -> str:
        names = [folder.name for folder in list_checkpoints(self._run)]
        if not names:
            return "there is none before it"
        aside = sorted(path.name for path in (self._run / FOLDER_NAME).glob("set-aside-*"))
        # A new one is written before an old one is removed.
        unneeded = ", ".join([*aside, *names[:-1]]) or "nothing in it; a second checkpoint needs as much room as the first"
        return f"the run goes on from {names[-1]} with --resume auto; not needed for that: {unneeded}"

    def wait(self) -> None:
        """Return when the last save is on disk; where it failed raise why, once: a `UserError` for what the disk refused."""
        # A thread that is joined counts as ended once Ctrl-C has interrupted that, though it still runs (Python 3.11 and 3.12).
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
    """Write what completes a checkpoint: its state, then the manifest of it and of `files`."""
    files = {**files, STATE_FILE: write_bytes(folder / STATE_FILE, state)}
    write_bytes(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, "files": files}, separators=(",", ":")).encode())


def remove_leftovers(run: Path) -> None:
    """Remove what killed saves and removals have left; raise an `OSError` where the folder of the checkpoints is gone."""
    for path in (run / FOLDER_NAME).iterdir():
        if path.name.startswith(".step-") and path.name.endswith(".tmp"):
            shutil.rmtree(path, ignore_errors=True)


def remove_unwanted(run: Path, newest: Path, keep: int, keep_step: int | None) -> None:
    """Remove what `CheckpointWriter` does not keep once `newest` is written."""
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
        raise UserError(f"{folder} cannot be written to ({error.strerror}): no checkpoint could be saved") from error
    try:
        # Of this process alone: a child that outlives it does not hold the lock.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise UserError(f"another process saves checkpoints in {folder}: stop it, or train in another folder") from None
    except OSError:
        pass  # A file system without locks.
    return descriptor
