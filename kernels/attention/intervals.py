"""Masks as intervals: under every mask, a query sees one interval of keys.

Causality, a sliding window and packed documents each restrict a query to keys [low, high), so their intersection is an interval
too. The queries that see a key also form an interval [low, high). Both bounds are non-decreasing in the position. The first and
the last row of a tile therefore determine the tiles to visit, and which of them need no mask.

Positions count keys. Queries are aligned to the end of the keys: query i has position i + num_keys - num_queries. `num_keys` is
the number of keys of a sequence, which may be fewer than the allocated ones. DOCUMENTS is 1 if begins and ends are indexed by
position; 2 if they hold an interval for each query (for each key, in the dK/dV kernels).

Functions take the mask of one sequence as the tuple `mask` = (num_queries, num_keys, window_left, window_right, begins_ptr,
ends_ptr), and constants that select the parts that apply.
"""

from ..dispatch import jit, tl


@jit
def mask_of(
    batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Return the `mask` tuple of one sequence."""
    if LENGTHS:
        num_keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), num_keys)
    offset = tl.cast(batch, tl.int64) * document_stride
    return num_queries, num_keys, window_left, window_right, begins_ptr + offset, ends_ptr + offset


@jit
def keys_of(queries, mask, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return (low, high), shaped like `queries`: each query sees the keys [low, high), none if high <= low."""
    num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr = mask
    positions = queries + (num_keys - num_queries)
    low = positions * 0
    high = low + num_keys
    if CAUSAL:
        high = tl.minimum(high, positions + 1)
    if WINDOW:
        low = tl.maximum(low, positions - window_left)
        if not CAUSAL:
            high = tl.minimum(high, positions + window_right + 1)
    if DOCUMENTS:
        rows = queries if DOCUMENTS == 2 else positions
        inside = (rows >= 0) & (rows < (num_queries if DOCUMENTS == 2 else num_keys))
        low = tl.maximum(low, tl.load(begins_ptr + rows, mask=inside, other=0))
        high = tl.minimum(high, tl.load(ends_ptr + rows, mask=inside, other=0))
    return low, tl.maximum(high, 0)


@jit
def queries_of(keys, mask, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return (low, high), shaped like `keys`: the queries [low, high) see each key, none if high <= low."""
    num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr = mask
    # Stored intervals are already in terms of queries, not positions.
    shift = 0 if DOCUMENTS == 2 else num_keys - num_queries
    low = keys * 0 + shift
    high = low + num_queries
    if CAUSAL:
        low = tl.maximum(low, keys)
    if WINDOW:
        high = tl.minimum(high, keys + window_left + 1)
        if not CAUSAL:
            low = tl.maximum(low, keys - window_right)
    if DOCUMENTS:
        inside = keys < num_keys
        low = tl.maximum(low, tl.load(begins_ptr + keys, mask=inside, other=0))
        high = tl.minimum(high, tl.load(ends_ptr + keys, mask=inside, other=0))
    return tl.maximum(low - shift, 0), tl.maximum(high - shift, 0)


@jit
def tiles_of(first_low, first_high, last_low, last_high, BLOCK: tl.constexpr):
    """Return (start, left, full_start, full_end, masked): the tiles of size `BLOCK` that intersect the rows' intervals.

    Tiles from full_start to full_end lie within the interval of every row and need no mask. The other `masked` tiles lie on
    both sides: `left` of them from start on, the rest from full_end on.
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
def query_tiles(
    start, mask,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return `tiles_of` for the queries from `start` on: tiles of the keys that they see."""
    last = tl.minimum(start + BLOCK_M, mask[0]) - 1
    first_low, first_high = keys_of(start, mask, CAUSAL, WINDOW, DOCUMENTS)
    last_low, last_high = keys_of(last, mask, CAUSAL, WINDOW, DOCUMENTS)
    return tiles_of(first_low, first_high, last_low, last_high, BLOCK_N)


@jit
def key_tiles(
    start, mask,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return `tiles_of` for the keys from `start` on: tiles of the queries that see them."""
    last = tl.minimum(start + BLOCK_N, mask[1]) - 1
    first_low, first_high = queries_of(start, mask, CAUSAL, WINDOW, DOCUMENTS)
    last_low, last_high = queries_of(last, mask, CAUSAL, WINDOW, DOCUMENTS)
    return tiles_of(first_low, first_high, last_low, last_high, BLOCK_M)
