"""Checkpoints as they lie on disk: named, listed, verified.

A checkpoint is a folder `checkpoints/step-00000200` of a run: safetensors files, `state.json`, and `manifest.json` with the
length and the SHA-256 of each of them, which is written last. Nothing in it is pickled.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ...errors import UserError
from .formats import MANIFEST_FILE, STATE_FILE, read_format
from .tensor_files import FileRecord

FOLDER_NAME = "checkpoints"

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Named tensors by the name of the file that holds them, as {"model": {...}, "optimizer": {...}}."""

# A step that is saved again, after going back to before it, gets the next free suffix until the older one is removed.
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


def checkpoint_step(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder} is not named as a checkpoint is, step-00000200")
    return int(match[1])


def free_folder(run: Path, step: int) -> Path:
    """Return a folder for a checkpoint of `step` where nothing stands yet."""
    folder = run / FOLDER_NAME / f"step-{step:08d}"
    again = 0
    while folder.exists():
        again += 1
        folder = folder.with_name(f"step-{step:08d}.{again}")
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Return the folders of the run's checkpoints, oldest first, be they valid or not."""
    found = []
    for folder in (run / FOLDER_NAME).glob("step-*"):
        match = _NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match[1]), int(match[2] or 0), folder))
    return [folder for *_, folder in sorted(found)]


def _check_length(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if size != record["bytes"]:
        raise UserError(f"{path} has {size} bytes, not {record['bytes']}: it was truncated or changed")


def check_content(path: Path, record: FileRecord) -> None:
    """Raise a `UserError` where a file is not the one that its record speaks of; a record without a hash says nothing."""
    if record["sha256"] is None:
        return
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if digest != record["sha256"]:
        raise UserError(f"{path} is damaged: its SHA-256 differs from that in {MANIFEST_FILE}")


def checked_files(folder: Path) -> dict[str, FileRecord]:
    """Return the files of a checkpoint; one that is missing, or of another length than was written, is a `UserError`."""
    _, files = read_format(folder)
    for name, record in files.items():
        _check_length(folder / name, record)
    return files


def group_of(file: str) -> str:
    """Return the name under which the tensors in a file of a checkpoint were saved."""
    return file.split("/")[0].removesuffix(".safetensors")


def verify_checkpoint(folder: Path, names: Collection[str] | None = None) -> None:
    """Raise a `UserError` that says what is wrong unless the checkpoint is whole, to the last byte.

    With `names` only the tensors saved under them are hashed, beside the state; of the others the lengths are compared.
    """
    files = checked_files(folder)
    hashed = [file for file in files if names is None or file == STATE_FILE or group_of(file) in names]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda file: check_content(folder / file, files[file]), hashed):
            pass


def newest_valid(run: Path, names: Collection[str] | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint that is valid, if any, and those newer than it, each with what is wrong with it.

    `names` as in `verify_checkpoint`.
    """
    skipped = []
    for folder in reversed(list_checkpoints(run)):
        try:
            verify_checkpoint(folder, names)
        except UserError as error:
            skipped.append((folder, str(error)))
        else:
            return folder, skipped
    return None, skipped
