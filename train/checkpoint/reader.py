"""Readers for the state and the tensors of checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from .formats import STATE_FILE, read_format, read_json
from .joined import NONE, Joined, parts_of_state, row_spans
from .layout import Tensors, check_content, checked_files, group_of
from .tensor_files import TensorReader


def read_state(folder: Path) -> dict[str, Any]:
    """Return the saved state, with `step` and `valid_loss` (None without a validation).

    Reads no tensors, unlike `verify_checkpoint`: checks only that every file exists with its full length.
    """
    format, _ = read_format(folder)
    check_content(folder / STATE_FILE, checked_files(folder)[STATE_FILE])
    return {**format.state, **read_json(folder / STATE_FILE)}


def tensor_names(folder: Path) -> list[str]:
    """Return the names of the groups of tensors in a checkpoint."""
    _, files = read_format(folder)
    return sorted({group_of(file) for file in files if file != STATE_FILE})


def read_tensors(folder: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the whole tensors of the group `name` in new memory; {} if the checkpoint's format lacks this group."""
    return {} if name in _absent(folder) else TensorReader(folder, name).read(device)


def load_weights(folder: Path, model: nn.Module, name: str = "model") -> None:
    """Load the weights of the group `name` into `model`. Raises a `UserError` if names or shapes differ."""
    load_into(folder, {name: model.state_dict()}, {name: "the model"})


def load_into(folder: Path, tensors: Tensors, labels: Mapping[str, str] | None = None, joined: Joined = NONE) -> None:
    """Fill `tensors` in place, DTensors with their local shards. Raises a `UserError` if names or shapes differ.

    Loads whole and sharded checkpoints from any number of processes. Each process reads the regions that it needs, without
    communication. Groups that the checkpoint's format lacks keep their values. `labels` maps a group to its name in errors.
    Under tensor parallelism, `joined` must be the result of `joined_parts` for the model.
    """
    absent = _absent(folder)
    readers = {group: TensorReader(folder, group) for group in tensors if group not in absent}
    for group, reader in readers.items():
        shapes = {name: tensor.shape for name, tensor in tensors[group].items()}
        reader.join_numbered(shapes)
        check_shapes(reader, shapes, folder, (labels or {}).get(group, f"the {group}"))
    for group, reader in readers.items():
        for name, tensor in tensors[group].items():
            for piece, offsets in _pieces(tensor, parts_of_state(name, joined)):
                reader.read_into(name, piece, offsets)


def _absent(folder: Path) -> tuple[str, ...]:
    # Folders that torch.distributed.checkpoint wrote hold the same tensor files, but no manifest.
    return read_format(folder)[0].absent if (folder / STATE_FILE).exists() else ()


def _pieces(tensor: Any, parts: tuple[int, ...] | None) -> list[tuple[Tensor, list[int] | None]]:
    """Return the local pieces of a tensor with their offsets in the whole; `parts` are the parts of a joined parameter."""
    if not hasattr(tensor, "to_local"):
        return [(tensor.detach(), None)]
    (chunk,) = tensor.__create_chunk_list__()
    local = tensor.detach().to_local()
    if local.dim() == 0:
        return [(local, None)]
    found = row_spans(tensor, chunk.offsets, local.shape[0], parts)
    return [(local[rows.start : rows.stop], offsets) for rows, offsets in found]


def check_shapes(reader: TensorReader, shapes: Mapping[str, torch.Size], folder: Path, what: str) -> None:
    """Raise a `UserError` unless the checkpoint holds tensors of exactly these names and shapes."""
    stored = reader.shapes
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in stored or name not in shapes:
            where = "the checkpoint" if name not in stored else what
            raise UserError(f"cannot load {folder}: {where} has no {name}; use the configuration that it was saved with")
        if stored[name] != shapes[name]:
            raise UserError(
                f"cannot load {folder}: {name} has shape {tuple(stored[name])} in the checkpoint, {tuple(shapes[name])} in "
                f"{what}; use the configuration that it was saved with"
            )
