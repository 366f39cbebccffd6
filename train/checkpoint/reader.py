"""Checkpoints read: their state and their tensors, whole, or into what a run has in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .formats import STATE_FILE, read_format, read_json
from .joined import NONE, Joined, parts_of_state, places
from .layout import Tensors, check_content, checked_files, group_of
from .tensor_files import TensorReader


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that was saved, with its `step` and its `valid_loss` (None where it had none).

    Unlike `verify_checkpoint` this reads no tensors, only checks that their files are there in full length.
    """
    format, _ = read_format(folder)
    check_content(folder / STATE_FILE, checked_files(folder)[STATE_FILE])
    return {**format.state, **read_json(folder / STATE_FILE)}


def tensor_names(folder: Path) -> list[str]:
    """Return the names under which the checkpoint holds tensors."""
    _, files = read_format(folder)
    return sorted({group_of(file) for file in files if file != STATE_FILE})


def read_tensors(folder: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the tensors saved under `name`, whole, in memory of their own; {} where the format had none of this name."""
    return {} if name in _absent(folder) else TensorReader(folder, name).read(device)


def load_weights(folder: Path, model: nn.Module, name: str = "model") -> None:
    """Load the weights saved under `name` into `model`; weights of other names or shapes are a `UserError`."""
    load_into(folder, {name: model.state_dict()}, {name: "the model"})


def load_into(folder: Path, tensors: Tensors, called: Mapping[str, str] | None = None, joined: Joined = NONE) -> None:
    """Fill `tensors` in place, DTensors with their own shards; other names or shapes than were saved are a `UserError`.

    However many processes saved it, and in either form; each process reads what it needs by itself. Tensors that the
    checkpoint's format had not yet stay as they are. `called` says what the error calls a group; `joined` is what
    `joined_parts` returns of the model, needed where its layers are divided.
    """
    absent = _absent(folder)
    readers = {group: TensorReader(folder, group) for group in tensors if group not in absent}
    for group, reader in readers.items():
        shapes = {name: tensor.shape for name, tensor in tensors[group].items()}
        reader.join_numbered(shapes)
        check_fits(reader, shapes, folder, (called or {}).get(group, f"the {group}"))
    for group, reader in readers.items():
        for name, tensor in tensors[group].items():
            for piece, offsets in _pieces(tensor, parts_of_state(name, joined)):
                reader.read_into(name, piece, offsets)


def _absent(folder: Path) -> tuple[str, ...]:
    # Folders that torch.distributed.checkpoint wrote have tensors of the same form, and no manifest.
    return read_format(folder)[0].absent if (folder / STATE_FILE).exists() else ()


def _pieces(tensor: Any, parts: tuple[int, ...] | None) -> list[tuple[Tensor, list[int] | None]]:
    """Return what this process has of a tensor, and where each piece begins in the whole; `parts` are of a joined one."""
    if not hasattr(tensor, "to_local"):
        return [(tensor.detach(), None)]
    (chunk,) = tensor.__create_chunk_list__()
    local = tensor.detach().to_local()
    if local.dim() == 0:
        return [(local, None)]
    found = places(tensor, chunk.offsets, local.shape[0], parts)
    return [(local[rows.start : rows.stop], offsets) for rows, offsets in found]


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
