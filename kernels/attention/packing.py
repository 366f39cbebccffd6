"""Where packed documents begin and end."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Where the document of each position begins and where it ends, both (B, S) int32: computed once for many layers."""

    begins: Tensor
    ends: Tensor


def documents(
    document_ids: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    batch: int | None = None,
    num_keys: int | None = None,
) -> Documents:
    """Return what `attention` takes as `document_ids`, from ids (B, S), or from cumulative lengths (documents + 1).

    A run of equal ids is a document. `cu_seqlens` hold for each of `batch` sequences of `num_keys` positions; those from the
    last length on are one more document.
    """
    if (document_ids is None) == (cu_seqlens is None):
        raise ValueError("document_ids and cu_seqlens: give one of them, and one only")
    if document_ids is not None:
        if document_ids.dim() != 2:
            raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}: allowed is (B, S), one a key")
        return Documents(*document_bounds(document_ids))
    if cu_seqlens is None or batch is None or num_keys is None:
        raise ValueError(f"batch is {batch}, num_keys {num_keys}: with cu_seqlens both are needed")
    return Documents(*cu_seqlens_bounds(cu_seqlens, batch, num_keys))


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the document of each position begins and where it ends: two (B, S) int32, from ids (B, S).

    A document is a run of equal ids.
    """
    num_positions = document_ids.shape[1]
    positions = torch.arange(num_positions, dtype=torch.int32, device=document_ids.device)
    differs = document_ids[:, 1:] != document_ids[:, :-1]
    edge = differs.new_ones(document_ids.shape[0], 1)
    begins = torch.where(torch.cat([edge, differs], dim=1), positions, 0)
    ends = torch.where(torch.cat([differs, edge], dim=1), positions + 1, num_positions)
    if num_positions == 0:
        return begins, ends
    return begins.cummax(dim=1).values, ends.flip(1).cummin(dim=1).values.flip(1)


def cu_seqlens_bounds(cu_seqlens: Tensor, batch: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return what `document_bounds` does, (B, S) with a batch stride of 0, from cumulative lengths (documents + 1).

    Positions from the last length on are one more document.
    """
    positions = torch.arange(num_positions, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    borders = torch.cat([cu_seqlens.clamp(max=num_positions), cu_seqlens.new_full((1,), num_positions)])
    document = torch.searchsorted(borders[:-1].contiguous(), positions, right=True)
    starts = borders[(document - 1).clamp(min=0)] * (document > 0)
    begins, ends = (t.to(torch.int32)[None].expand(batch, -1) for t in (starts, borders[document]))
    return begins, ends
