"""Which keys a query sees: one interval of them, whatever the mask.

Causality, a sliding window and packed documents each confine a query to keys [low, high), so their intersection does too;
seen from a key, the queries that see it are an interval [low, high) as well. Both ends grow with the position. Hence the
first and the last row of a tile tell which tiles it meets, and which of those need no mask. A position is that of a key;
queries stand at the end of the keys: query i has the position i + num_keys - num_queries. `num_keys` counts those that a
sequence has, which may be fewer than there is memory for. DOCUMENTS is 1 where positions have documents; 2 where each query
and each key has its interval in memory, begins and ends being those of the rows that a kernel asks for.

A mask goes from function to function as the tuple `mask` = (num_queries, num_keys, window_left, window_right, begins_ptr,
ends_ptr) of one sequence, beside the constants that say which parts of it count.
"""

from ..dispatch import jit, tl


@jit
def mask_of(
    batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Return the mask of one sequence, as the functions below take it."""
    if LENGTHS:
        num_keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), num_keys)
    offset = tl.cast(batch, tl.int64) * document_stride
    return num_queries, num_keys, window_left, window_right, begins_ptr + offset, ends_ptr + offset


@jit
def keys_of(queries, mask, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return low and high, like `queries`: the keys [low, high) that each query sees; none where high <= low."""
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
    """Return low and high, like `keys`: the queries [low, high) that see each key; none where high <= low."""
    num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr = mask
    # Of intervals in memory nothing needs the positions of queries.
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
def query_tiles(
    start, mask,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return `tiles_of` the queries from `start` on."""
    last = tl.minimum(start + BLOCK_M, mask[0]) - 1
    first_low, first_high = keys_of(start, mask, CAUSAL, WINDOW, DOCUMENTS)
    last_low, last_high = keys_of(last, mask, CAUSAL, WINDOW, DOCUMENTS)
    return tiles_of(first_low, first_high, last_low, last_high, BLOCK_N)


@jit
def key_tiles(
    start, mask,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return `tiles_of` the keys from `start` on: tiles of the queries that see them."""
    last = tl.minimum(start + BLOCK_N, mask[1]) - 1
    first_low, first_high = queries_of(start, mask, CAUSAL, WINDOW, DOCUMENTS)
    last_low, last_high = queries_of(last, mask, CAUSAL, WINDOW, DOCUMENTS)
    return tiles_of(first_low, first_high, last_low, last_high, BLOCK_M)
