"""The layout of checkpoints on disk: names, lists, verification.

A checkpoint is a folder `checkpoints/step-00000200` of a run. It holds safetensors files, `state.json`, and `manifest.json`
with the length and the SHA-256 of every file. The manifest is written last. No file is a pickle.
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
"""Named tensors by group. A group is saved as one file or one set of shards: {"model": {...}, "optimizer": {...}}."""

# A step that a run saves a second time, after it went back, gets the next free suffix; the older folder is removed later.
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


def checkpoint_step(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder} is not a checkpoint: expected a name such as step-00000200")
    return int(match[1])


def free_folder(run: Path, step: int) -> Path:
    """Return the path of a new checkpoint folder for `step`. The path does not exist yet."""
    folder = run / FOLDER_NAME / f"step-{step:08d}"
    suffix = 0
    while folder.exists():
        suffix += 1
        folder = folder.with_name(f"step-{step:08d}.{suffix}")
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run by ascending step, without verification."""
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
        raise UserError(f"cannot read {path}: {error}") from error
    if size != record["bytes"]:
        raise UserError(f"{path} has {size} bytes: expected {record['bytes']}; it was truncated or changed")


def check_content(path: Path, record: FileRecord) -> None:
    """Raise a `UserError` if the hash of a file differs from its record. A record without a hash is not checked."""
    if record["sha256"] is None:
        return
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if digest != record["sha256"]:
        raise UserError(f"{path} is damaged: its SHA-256 differs from the one in {MANIFEST_FILE}")


def checked_files(folder: Path) -> dict[str, FileRecord]:
    """Return the records of a checkpoint's files. Raises a `UserError` if a file is missing or has another length."""
    _, files = read_format(folder)
    for name, record in files.items():
        _check_length(folder / name, record)
    return files


def group_of(file: str) -> str:
    """Return the group of tensors, such as "model", that a file of a checkpoint holds."""
    return file.split("/")[0].removesuffix(".safetensors")


def verify_checkpoint(folder: Path, names: Collection[str] | None = None) -> None:
    """Raise a `UserError` if any file of the checkpoint is missing or differs from the manifest.

    With `names`, hash only the state and the groups of tensors in `names`. Compare the lengths of all files.
    """
    files = checked_files(folder)
    hashed = [file for file in files if names is None or file == STATE_FILE or group_of(file) in names]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda file: check_content(folder / file, files[file]), hashed):
            pass


def newest_valid(run: Path, names: Collection[str] | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest valid checkpoint or None, and each newer checkpoint with the reason why it is not valid.

    `names` has the meaning it has in `verify_checkpoint`.
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
