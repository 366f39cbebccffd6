"""The formats of checkpoints that can be read: where each says what it holds, and what it lacks of today's.

tilewright-checkpoint-2: `manifest.json` lists the files with their hashes. tilewright-checkpoint-1: `state.json` names the
format and the step, and nothing is hashed; weights and the optimizer's state are under the names of today.
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
    """How the checkpoints of one format are read."""

    files: Callable[[Path, dict[str, Any]], dict[str, FileRecord]]
    """`files(folder, document)` returns what is known of each file; `document` is what names the format."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What its `state.json` lacks of today's."""
    absent: tuple[str, ...] = ()
    """Tensors of a run that it lacks: they begin anew."""


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; one that cannot be read is a `UserError`."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _listed(folder: Path, manifest: dict[str, Any]) -> dict[str, FileRecord]:
    path, files = folder / MANIFEST_FILE, manifest.get("files")
    if not isinstance(files, dict) or STATE_FILE not in files:
        raise UserError(f"{path} is damaged: it lists no {STATE_FILE}")
    for name, record in files.items():
        fits = isinstance(record, dict) and type(record.get("bytes")) is int and isinstance(record.get("sha256"), str)
        if not fits or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} is damaged: its entry {name!r} is not one of a file")
    return files


def _unlisted(folder: Path, _state: dict[str, Any]) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {STATE_FILE: {"bytes": (folder / STATE_FILE).stat().st_size, "sha256": None}}
    for name in ("model.safetensors", "optimizer.safetensors"):
        files[name] = {"bytes": tensors_length(folder / name), "sha256": None}
    return files


FORMATS: dict[str, Format] = {
    FORMAT: Format(_listed),
    "tilewright-checkpoint-1": Format(_unlisted, state={"unfinished_row": None, "valid_loss": None}, absent=("guard", "rng")),
}


def read_format(folder: Path) -> tuple[Format, dict[str, FileRecord]]:
    """Return the format of a checkpoint, and what is known of its files; what is no checkpoint is a `UserError`."""
    path = folder / MANIFEST_FILE
    try:
        document = read_json(path)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        document = _state_that_names_a_format(folder)
    if not isinstance(document, dict) or "format" not in document:
        raise UserError(f"{path} is not a manifest of a checkpoint")
    format = FORMATS.get(str(document["format"]))
    if format is None:
        raise UserError(
            f"{folder} is a checkpoint of format {document['format']!r}: this version reads {', '.join(FORMATS)}; a later one "
            "may read it"
        )
    return format, format.files(folder, document)


def _state_that_names_a_format(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
        if "format" in state:
            return state
    except (OSError, ValueError, TypeError):
        pass
    what = f"a whole checkpoint: it has no {MANIFEST_FILE}" if folder.is_dir() else "a checkpoint: there is no such folder"
    raise UserError(f"{folder} is not {what}")
