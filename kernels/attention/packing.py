"""Where packed documents begin and end."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_device, check_dtype, check_int


class Documents(NamedTuple):
    """Where the document of each position begins and where it ends, both (B, S) int32: computed once for many layers."""

    begins: Tensor
    ends: Tensor

    def check(self) -> None:
        """Refuse what `documents` does not make."""
        begins, ends = self
        if begins.shape != ends.shape:
            raise ValueError(f"begins has shape {tuple(begins.shape)}, ends {tuple(ends.shape)}: allowed is one shape")
        check_dtype((torch.int32,), begins=begins, ends=ends)
        check_device(begins=begins, ends=ends)

    def in_rows(self) -> tuple[Tensor, Tensor]:
        """Return begins and ends as kernels read them: positions are neighbours in memory, both have the same strides."""
        begins, ends = self
        if begins.stride() == ends.stride() and begins.stride(1) == 1:
            return begins, ends
        return begins.contiguous(), ends.contiguous()


def documents(
    document_ids: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    batch: int | None = None,
    num_keys: int | None = None,
) -> Documents:
    """Return what `attention` takes as `document_ids`, from ids (B, S), or from cumulative lengths.

    A run of equal ids is a document. `cu_seqlens` hold for each of `batch` sequences of `num_keys` positions; what stands
    before the first length or from the last one on is a document too.
    """
    if (document_ids is None) == (cu_seqlens is None):
        raise ValueError("document_ids and cu_seqlens: give one of them, and one only")
    if document_ids is not None:
        if not isinstance(document_ids, Tensor) or document_ids.dim() != 2:
            given = tuple(document_ids.shape) if isinstance(document_ids, Tensor) else type(document_ids).__name__
            raise ValueError(f"document_ids has shape {given}: allowed is (B, S), one a key")
        return Documents(*document_bounds(document_ids))
    if cu_seqlens is None or batch is None or num_keys is None:
        raise ValueError(f"batch is {batch}, num_keys {num_keys}: with cu_seqlens both are needed")
    check_int("batch", batch, 0)
    check_int("num_keys", num_keys, 0)
    check_cu_seqlens(cu_seqlens=cu_seqlens)
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
    borders = _borders(cu_seqlens, num_positions)
    return _intervals(borders, borders, num_positions, batch)


class Intervals(NamedTuple):
    """Which keys [begins, ends) each query sees, (B, T), and which queries see each key, (B, S), all int32.

    From row to row neither end decreases, not even where nothing is between them.
    """

    begins: Tensor
    ends: Tensor
    query_begins: Tensor
    query_ends: Tensor


def cross_intervals(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    batch: int,
    num_queries: int,
    num_keys: int,
    window: tuple[int, int] = (-1, -1),
) -> Intervals:
    """Return the mask of documents of which queries and keys have cumulative lengths of their own, (documents + 1) each.

    The last query of a document stands at its last key. A query sees `window` (left, right) keys before its own and behind
    it, -1 for all.
    """
    queries, keys = _borders(cu_seqlens, num_queries), _borders(cu_seqlens_k, num_keys)
    left, right = window
    of_queries = _intervals(queries, keys, num_queries, batch, left, right)
    return Intervals(*of_queries, *_intervals(keys, queries, num_keys, batch, right, left))


def _borders(cu_seqlens: Tensor, size: int) -> Tensor:
    # What stands before the first length, and what stands from the last one on, are documents too. In int64, because a window's
    # side is added to a position.
    cu_seqlens = cu_seqlens.long()
    return torch.cat([cu_seqlens.new_zeros(1), cu_seqlens.clamp(max=size), cu_seqlens.new_full((1,), size)])


def _intervals(own: Tensor, others: Tensor, size: int, batch: int, before: int = -1, after: int = -1) -> tuple[Tensor, Tensor]:
    # Of each of `size` rows the other side's rows of its document, so many before the row's own place and after it at most.
    rows = torch.arange(size, dtype=own.dtype, device=own.device)
    document = torch.searchsorted(own[1:-1], rows, right=True)
    begins, ends = others[document], others[document + 1]
    place = rows - own[document + 1] + ends
    low = begins if before < 0 else torch.maximum(begins, torch.minimum(place - before, ends))
    high = ends if after < 0 else torch.minimum(ends, torch.maximum(place + after + 1, begins))
    low, high = (t.to(torch.int32)[None].expand(batch, -1) for t in (low, high))
    return low, high
