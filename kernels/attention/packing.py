"""Begins and ends of packed documents."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_device, check_dtype, check_int


class Documents(NamedTuple):
    """Begin and end (exclusive) of the document of each position, both (B, S) int32. Compute once and share between layers."""

    begins: Tensor
    ends: Tensor

    def check(self) -> None:
        """Raise ValueError unless begins and ends have the same shape and device and dtype int32."""
        begins, ends = self
        if begins.shape != ends.shape:
            raise ValueError(f"begins has shape {tuple(begins.shape)}, ends {tuple(ends.shape)}: expected the same shape")
        check_dtype((torch.int32,), begins=begins, ends=ends)
        check_device(begins=begins, ends=ends)

    def in_rows(self) -> tuple[Tensor, Tensor]:
        """Return begins and ends with the same strides and contiguous positions, as the kernels expect. Copies if needed."""
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
    """Return a `Documents` from ids (B, S) or from cumulative lengths; pass it to `attention` as `document_ids`.

    A run of equal ids is a document. `cu_seqlens` applies to each of `batch` sequences of `num_keys` positions. Positions
    before the first length, and from the last length on, are documents too.
    """
    if (document_ids is None) == (cu_seqlens is None):
        raise ValueError("expected exactly one of document_ids and cu_seqlens")
    if document_ids is not None:
        if not isinstance(document_ids, Tensor) or document_ids.dim() != 2:
            given = tuple(document_ids.shape) if isinstance(document_ids, Tensor) else type(document_ids).__name__
            raise ValueError(f"document_ids has shape {given}: expected (B, S), one per key")
        return Documents(*document_bounds(document_ids))
    if cu_seqlens is None or batch is None or num_keys is None:
        raise ValueError(f"batch is {batch}, num_keys is {num_keys}: expected both with cu_seqlens")
    check_int("batch", batch, 0)
    check_int("num_keys", num_keys, 0)
    check_cu_seqlens(cu_seqlens=cu_seqlens)
    return Documents(*cu_seqlens_bounds(cu_seqlens, batch, num_keys))


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the begin and the end of the document of each position, both (B, S) int32, from ids (B, S).

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
    """Return the same as `document_bounds`, with a batch stride of 0, from cumulative lengths (documents + 1).

    Positions from the last length on are one more document.
    """
    borders = _borders(cu_seqlens, num_positions)
    return _intervals(borders, borders, num_positions, batch)


class Intervals(NamedTuple):
    """The keys [begins, ends) that each query sees, (B, T), and the queries that see each key, (B, S), all int32.

    Both bounds are non-decreasing along the rows, even where an interval is empty.
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
    """Return the mask of documents whose queries and keys have separate cumulative lengths, (documents + 1) each.

    The last query of a document is aligned to its last key. A query sees `window` = (left, right) keys before and after its
    own; -1 for all.
    """
    queries, keys = _borders(cu_seqlens, num_queries), _borders(cu_seqlens_k, num_keys)
    left, right = window
    of_queries = _intervals(queries, keys, num_queries, batch, left, right)
    return Intervals(*of_queries, *_intervals(keys, queries, num_keys, batch, right, left))


def _borders(cu_seqlens: Tensor, size: int) -> Tensor:
    # Positions before the first length, and from the last length on, are documents too. int64, so that adding a side of the
    # window to a position does not overflow.
    cu_seqlens = cu_seqlens.long()
    return torch.cat([cu_seqlens.new_zeros(1), cu_seqlens.clamp(max=size), cu_seqlens.new_full((1,), size)])


def _intervals(own: Tensor, others: Tensor, size: int, batch: int, before: int = -1, after: int = -1) -> tuple[Tensor, Tensor]:
    # For each of `size` rows: the interval of the other side's rows in the same document, cut to `before` and `after` rows
    # around the row's aligned position.
    rows = torch.arange(size, dtype=own.dtype, device=own.device)
    document = torch.searchsorted(own[1:-1], rows, right=True)
    begins, ends = others[document], others[document + 1]
    place = rows - own[document + 1] + ends
    low = begins if before < 0 else torch.maximum(begins, torch.minimum(place - before, ends))
    high = ends if after < 0 else torch.minimum(ends, torch.maximum(place + after + 1, begins))
    low, high = (t.to(torch.int32)[None].expand(batch, -1) for t in (low, high))
    return low, high
