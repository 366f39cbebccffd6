"""The order of rows of joined parameters, such as `qkv_proj.weight`, under tensor parallelism."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...model.layers import JoinedLinear

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TP_MESH = "tp"
"""The mesh dimension of tensor parallelism."""

Joined = Mapping[str, tuple[int, ...]]
"""The number of rows of each part of a joined parameter, by parameter name."""
NONE: Joined = MappingProxyType({})


def joined_parts(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the number of rows of each part of every joined parameter, by parameter name.

    Each process holds a share of every part. A DTensor therefore orders the rows by process first, then by part. A state dict
    and a checkpoint order them by part.
    """
    return {
        f"{name}.{kind}": layer.parts
        for name, layer in module.named_modules()
        if isinstance(layer, JoinedLinear)
        for kind, _ in layer.named_parameters(recurse=False)
    }


def rows_by_process(parts: tuple[int, ...], tp: int) -> Iterator[range]:
    """Yield the rows of a joined parameter in the order of the processes: one range for each part of each process."""
    starts = [sum(parts[:i]) for i in range(len(parts))]
    for rank in range(tp):
        for start, part in zip(starts, parts, strict=True):
            share = part // tp
            yield range(start + rank * share, start + (rank + 1) * share)


def row_spans(
    tensor: "DTensor", offsets: Sequence[int], length: int, parts: tuple[int, ...] | None
) -> list[tuple[range, list[int]]]:
    """Return the spans of a process's `length` rows, which begin at `offsets`, that are contiguous in the whole parameter.

    Each span is a range of local rows and the offsets of its first row in the whole parameter.
    """
    mesh = tensor.device_mesh
    tp = mesh[TP_MESH].size() if TP_MESH in (mesh.mesh_dim_names or ()) else 1
    if parts is None or tp == 1:
        return [(range(length), list(offsets))]
    first, *rest = offsets
    found, begin = [], 0
    for rows in rows_by_process(parts, tp):
        low, high = max(first, begin), min(first + length, begin + len(rows))
        if low < high:
            found.append((range(low - first, high - first), [rows[low - begin], *rest]))
        begin += len(rows)
    return found


def parts_of_state(name: str, joined: Joined) -> tuple[int, ...] | None:
    """Return the parts of a parameter's state, such as `exp_avg.layers.0.attn.qkv_proj.weight`; None if it is not joined."""
    while name not in joined:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return joined[name]


def order_rows_by_process(weights: Mapping[str, Tensor], module: nn.Module, tp: int) -> dict[str, Tensor]:
    """Return the weights of `module` with the rows of joined parameters in the order of `rows_by_process`."""
    parts, ordered = joined_parts(module), dict(weights)
    for name in parts.keys() & weights.keys():
        ordered[name] = torch.cat([weights[name][rows.start : rows.stop] for rows in rows_by_process(parts[name], tp)])
    return ordered
