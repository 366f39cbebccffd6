"""Checkpoints as they lie on disk: listed, verified, read.

A checkpoint is a folder `checkpoints/step-00000200` of a run: safetensors files, `state.json`, and `manifest.json` with the
length and the SHA-256 of each of them, which is written last. Nothing in it is pickled.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .tensor_files import FileRecord, TensorReader

FORMAT = "tilewright-checkpoint-2"
FOLDER_NAME = "checkpoints"
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.json"

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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _manifest(folder: Path) -> dict[str, FileRecord]:
    path = folder / MANIFEST_FILE
    try:
        manifest = _read_json(path)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        what = f"a whole checkpoint: it has no {MANIFEST_FILE}" if folder.is_dir() else "a checkpoint: there is no such folder"
        raise UserError(f"{folder} is not {what}") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise UserError(f"{path} is not a manifest of a checkpoint")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder} is a checkpoint of format {manifest['format']!r}: this version reads {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE_FILE not in files:
        raise UserError(f"{path} is damaged: it lists no {STATE_FILE}")
    for name, record in files.items():
        fits = isinstance(record, dict) and type(record.get("bytes")) is int and isinstance(record.get("sha256"), str)
        if not fits or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} is damaged: its entry {name!r} is not one of a file")
    return files


def _check_length(path: Path, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if size != record["bytes"]:
        raise UserError(f"{path} has {size} bytes, not {record['bytes']}: it was truncated or changed")


def _check_content(path: Path, record: FileRecord) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if digest != record["sha256"]:
        raise UserError(f"{path} is damaged: its SHA-256 differs from that in {MANIFEST_FILE}")


def _checked_manifest(folder: Path) -> dict[str, FileRecord]:
    files = _manifest(folder)
    for name, record in files.items():
        _check_length(folder / name, record)
    return files


def _group(file: str) -> str:
    return file.split("/")[0].removesuffix(".safetensors")


def verify_checkpoint(folder: Path, names: Collection[str] | None = None) -> None:
    """Raise a `UserError` that says what is wrong unless the checkpoint is whole, to the last byte.

    With `names` only the tensors saved under them are hashed, beside the state; of the others the lengths are compared.
    """
    files = _checked_manifest(folder)
    hashed = [file for file in files if names is None or file == STATE_FILE or _group(file) in names]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda file: _check_content(folder / file, files[file]), hashed):
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


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that was saved, with its `step` and its `valid_loss` (None where it had none).

    Unlike `verify_checkpoint` this reads no tensors, only checks that their files are there in full length.
    """
    files = _checked_manifest(folder)
    _check_content(folder / STATE_FILE, files[STATE_FILE])
    return _read_json(folder / STATE_FILE)


def tensor_names(folder: Path) -> list[str]:
    """Return the names under which the checkpoint holds tensors."""
    return sorted({_group(file) for file in _manifest(folder) if file != STATE_FILE})


def read_tensors(folder: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the tensors saved under `name`, whole, in memory of their own."""
    return TensorReader(folder, name).read(device)


def load_weights(folder: Path, model: nn.Module, name: str = "model") -> None:
    """Load the weights saved under `name` into `model`; weights of other names or shapes are a `UserError`."""
    expected = model.state_dict()
    reader = TensorReader(folder, name)
    check_fits(reader, {key: value.shape for key, value in expected.items()}, folder, "the model")
    for key, value in expected.items():
        reader.read_into(key, value)


def check_fits(reader: TensorReader, shapes: Mapping[str, torch.Size], folder: Path, what: str) -> None:
    """Raise a `UserError` unless the checkpoint holds tensors of exactly these names and shapes."""
    stored = reader.shapes
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in stored or name not in shapes:
            where = "the checkpoint" if name not in stored else what
            raise UserError(f"{folder} does not fit {what}, {where} has no {name}: use the configuration it was made with")
        if stored[name] != shapes[name]:
            raise UserError(
                f"{folder} does not fit {what}, {name} has shape {tuple(stored[name])} in the checkpoint, "
                f"{tuple(shapes[name])} in {what}: use the configuration it was made with"
            )
