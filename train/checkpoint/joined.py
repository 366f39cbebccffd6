"""Joined parameters whose layers are divided over processes (tensor parallelism): where each row lies in the whole."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...model.layers import JoinedLinear

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TP_MESH = "tp"
"""The dimension of a mesh over which layers are divided."""

Joined = Mapping[str, tuple[int, ...]]
"""Rows of each part of every joined parameter, by its name."""
NONE: Joined = MappingProxyType({})


def joined_parts(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return how many rows each part has of every joined parameter, by its name.

    A process has its share of each part. Cut into one range of rows a process, such a parameter is in another order than in a
    state dict or a checkpoint: all that the first process has of each part, then all that the second has.
    """
    return {
        f"{name}.{kind}": layer.parts
        for name, layer in module.named_modules()
        if isinstance(layer, JoinedLinear)
        for kind, _ in layer.named_parameters(recurse=False)
    }


def rows_of_processes(parts: tuple[int, ...], tp: int) -> Iterator[range]:
    """Yield the rows of a joined parameter in the order in which processes hold them, a range for each part of each process."""
    starts = [sum(parts[:i]) for i in range(len(parts))]
    for rank in range(tp):
        for start, part in zip(starts, parts, strict=True):
            share = part // tp
            yield range(start + rank * share, start + (rank + 1) * share)


def places(
    tensor: "DTensor", offsets: Sequence[int], length: int, parts: tuple[int, ...] | None
) -> list[tuple[range, list[int]]]:
    """Return which of a process's `length` rows, from `offsets` on, are together in the whole, and where they begin there."""
    mesh = tensor.device_mesh
    tp = mesh[TP_MESH].size() if TP_MESH in (mesh.mesh_dim_names or ()) else 1
    if parts is None or tp == 1:
        return [(range(length), list(offsets))]
    first, *rest = offsets
    found, begin = [], 0
    for rows in rows_of_processes(parts, tp):
        low, high = max(first, begin), min(first + length, begin + len(rows))
        if low < high:
            found.append((range(low - first, high - first), [rows[low - begin], *rest]))
        begin += len(rows)
    return found


def parts_of_state(name: str, joined: Joined) -> tuple[int, ...] | None:
    """Return the parts of a state, such as `exp_avg.layers.0.attn.qkv_proj.weight`; None where its parameter is not joined."""
    while name not in joined:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return joined[name]


def in_order_of_processes(weights: Mapping[str, Tensor], module: nn.Module, tp: int) -> dict[str, Tensor]:
    """Return the weights of `module` with the rows of joined ones in the order of `rows_of_processes`."""
    parts, ordered = joined_parts(module), dict(weights)
    for name in parts.keys() & weights.keys():
        ordered[name] = torch.cat([weights[name][rows.start : rows.stop] for rows in rows_of_processes(parts[name], tp)])
    return ordered
