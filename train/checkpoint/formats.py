"""The checkpoint formats that can be read, and the defaults for state that older formats lack.

tilewright-checkpoint-2: `manifest.json` lists the files with their hashes. tilewright-checkpoint-1: `state.json` names the
format and the step, and files have no hashes; tensors have the same names as in format 2.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from .tensor_files import FileRecord, tensors_length

FORMAT = "tilewright-checkpoint-2"
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Format:
    """How to read the checkpoints of one format."""

    files: Callable[[Path, dict[str, Any]], dict[str, FileRecord]]
    """`files(folder, document)` returns the record of each file; `document` is the parsed JSON that names the format."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Defaults for the keys that `state.json` lacks in this format."""
    absent: tuple[str, ...] = ()
    """Groups of tensors that this format lacks. A resumed run initializes them."""


def read_json(path: Path) -> Any:
    """Return the parsed contents of a JSON file. Raises a `UserError` if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _files_in_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, FileRecord]:
    path, files = folder / MANIFEST_FILE, manifest.get("files")
    if not isinstance(files, dict) or STATE_FILE not in files:
        raise UserError(f"{path} is damaged: it does not list {STATE_FILE}")
    for name, record in files.items():
        fits = isinstance(record, dict) and type(record.get("bytes")) is int and isinstance(record.get("sha256"), str)
        if not fits or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} is damaged: its entry {name!r} is not the record of a file")
    return files


def _files_without_manifest(folder: Path, _state: dict[str, Any]) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {STATE_FILE: {"bytes": (folder / STATE_FILE).stat().st_size, "sha256": None}}
    for name in ("model.safetensors", "optimizer.safetensors"):
        files[name] = {"bytes": tensors_length(folder / name), "sha256": None}
    return files


FORMATS: dict[str, Format] = {
    FORMAT: Format(_files_in_manifest),
    "tilewright-checkpoint-1": Format(
        _files_without_manifest, state={"unfinished_row": None, "valid_loss": None}, absent=("guard", "rng")
    ),
}


def read_format(folder: Path) -> tuple[Format, dict[str, FileRecord]]:
    """Return the format of a checkpoint and the records of its files. Raises a `UserError` for any other folder."""
    path = folder / MANIFEST_FILE
    try:
        document = read_json(path)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        document = _state_with_format(folder)
    if not isinstance(document, dict) or "format" not in document:
        raise UserError(f"{path} is not the manifest of a checkpoint")
    format = FORMATS.get(str(document["format"]))
    if format is None:
        raise UserError(
            f"{folder} is a checkpoint of format {document['format']!r}: expected one of {', '.join(FORMATS)}; "
            "a later version may read it"
        )
    return format, format.files(folder, document)


def _state_with_format(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
        if "format" in state:
            return state
    except (OSError, ValueError, TypeError):
        pass
    what = f"a complete checkpoint: it has no {MANIFEST_FILE}" if folder.is_dir() else "a checkpoint: there is no such folder"
    raise UserError(f"{folder} is not {what}")
