"""Which keys a query sees: one interval of them, whatever the mask.

Causality, a sliding window and packed documents each confine a query to keys [low, high), so their intersection does too;
seen from a key, the queries that see it are an interval [low, high) as well. Both ends grow with the position. Hence the
first and the last row of a tile tell which tiles it meets, and which of those need no mask. A position is that of a key;
queries stand at the end of the keys: query i has the position i + num_keys - num_queries.
"""

import torch
from torch import Tensor

from ..dispatch import jit, tl


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


@jit
def keys_of(
    queries, num_queries, num_keys, window, begins_ptr, ends_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return low and high, like `queries`: the keys [low, high) that each query sees; none where high <= low."""
    positions = queries + (num_keys - num_queries)
    low = positions * 0
    high = low + num_keys
    if CAUSAL:
        high = tl.minimum(high, positions + 1)
    if WINDOW:
        low = tl.maximum(low, positions - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, positions + window)
    if DOCUMENTS:
        inside = (positions >= 0) & (positions < num_keys)
        low = tl.maximum(low, tl.load(begins_ptr + positions, mask=inside, other=0))
        high = tl.minimum(high, tl.load(ends_ptr + positions, mask=inside, other=0))
    return low, tl.maximum(high, 0)


@jit
def queries_of(
    keys, num_queries, num_keys, window, begins_ptr, ends_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return low and high, like `keys`: the queries [low, high) that see each key; none where high <= low."""
    shift = num_keys - num_queries
    low = keys * 0 + shift
    high = keys * 0 + num_keys
    if CAUSAL:
        low = tl.maximum(low, keys)
    if WINDOW:
        high = tl.minimum(high, keys + window)
        if not CAUSAL:
            low = tl.maximum(low, keys - window + 1)
    if DOCUMENTS:
        inside = keys < num_keys
        low = tl.maximum(low, tl.load(begins_ptr + keys, mask=inside, other=0))
        high = tl.minimum(high, tl.load(ends_ptr + keys, mask=inside, other=0))
    return tl.maximum(low - shift, 0), tl.maximum(high - shift, 0)


@jit
def tiles_of(first_low, first_high, last_low, last_high, BLOCK: tl.constexpr):
    """Return (start, left, full_start, full_end, masked): the tiles of `BLOCK` that rows with these intervals meet.

    Tiles from full_start to full_end lie within the interval of every row. The other `masked` tiles lie to both sides:
    `left` of them from start on, the rest from full_end on.
    """
    start = first_low // BLOCK * BLOCK
    full_start = tl.maximum(tl.cdiv(last_low, BLOCK) * BLOCK, start)
    full_end = first_high // BLOCK * BLOCK
    if full_end <= full_start:
        full_start = start
        full_end = start
    left = (full_start - start) // BLOCK
    right = tl.cdiv(tl.maximum(last_high - full_end, 0), BLOCK)
    return start, left, full_start, full_end, left + right


@jit
def query_tile(
    start, num_queries, num_keys, window, begins_ptr, ends_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (queries, low, high, tiles): the queries from `start` on, their intervals of keys, and `tiles_of` them all."""
    queries = start + tl.arange(0, BLOCK_M)
    last = tl.minimum(start + BLOCK_M, num_queries) - 1
    low, high = keys_of(queries, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS)
    first_low, first_high = keys_of(start, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS)
    last_low, last_high = keys_of(last, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS)
    return queries, low, high, tiles_of(first_low, first_high, last_low, last_high, BLOCK_N)


@jit
def key_tile(
    start, num_queries, num_keys, window, begins_ptr, ends_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (low, high, tiles): the intervals of queries that see the keys from `start` on, and `tiles_of` them all."""
    keys = start + tl.arange(0, BLOCK_N)
    last = tl.minimum(start + BLOCK_N, num_keys) - 1
    low, high = queries_of(keys, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS)
    first_low, first_high = queries_of(start, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS)
    last_low, last_high = queries_of(last, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS)
    return low, high, tiles_of(first_low, first_high, last_low, last_high, BLOCK_M)
