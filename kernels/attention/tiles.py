"""Assign tiles to programs, and load and store them through pointers or TMA descriptors."""

from ..dispatch import jit, tl

# Arguments that Triton must not specialize: their divisibility helps no load, and a growing cache would recompile at new
# lengths.
SIZES = (
    "num_rows", "num_heads", "num_kv_heads", "num_queries", "num_keys", "window_left", "window_right", "rows_at_once",
    "num_splits", "num_parts", "document_stride",
)  # fmt: skip


@jit
def program_of(program, num_tiles, num_rows, rows_at_once, LAST_FIRST: tl.constexpr):
    """Return (tile, row) of a program, where `num_rows` rows (batch and head) have `num_tiles` tiles each.

    Concurrent programs share the keys and values of `rows_at_once` rows, which fit in the L2 cache together. Under a causal
    mask the tiles differ in work; LAST_FIRST starts the longest first, which shortens the tail.
    """
    group = program // (rows_at_once * num_tiles)
    first_row = group * rows_at_once
    group_rows = tl.minimum(num_rows - first_row, rows_at_once)
    place = program - first_row * num_tiles
    tile = place // group_rows
    if LAST_FIRST:
        tile = num_tiles - 1 - tile
    return tile, first_row + place % group_rows


@jit
def head_and_place(i, num_tiles, first_head, GROUPED: tl.constexpr):
    """Return the head of the i-th tile and the tile's index within it, where each head has `num_tiles` tiles."""
    head = first_head
    place = i
    if GROUPED:
        # The pipeline may evaluate this even if there are no tiles, so avoid a division by 0.
        head += i // tl.maximum(num_tiles, 1)
        place = i % tl.maximum(num_tiles, 1)
    return head, place


@jit
def stride_unit(source):
    """Return the number of elements per unit of the strides from `load_strides`."""
    return 8 if source.dtype.element_ty.primitive_bitwidth == 16 else 1


@jit
def load_base(source, batch, head, batch_stride, head_stride, TMA: tl.constexpr):
    """Return a pointer to one head of one sequence; return a TMA descriptor unchanged."""
    if not TMA:
        offset = tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        source = source + offset * stride_unit(source)
    return source


@jit
def load_tile(
    base, batch, head, start, end, token_stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load (ROWS, WIDTH) of a head from token `start` on, with 0 beyond the head dim and, if MASKED, from token `end` on."""
    if TMA:
        # The hardware fills out-of-bounds elements with 0.
        tile = base.load([batch, head, start, 0]).reshape(ROWS, WIDTH)
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, WIDTH)[None, :]
        stride = token_stride * stride_unit(base)
        # One 64-bit base per tile; 32-bit offsets within the tile save registers.
        address = base + tl.cast(start, tl.int64) * stride + rows * stride + columns
        if HEAD_DIM < WIDTH:
            mask = columns < HEAD_DIM
            if MASKED:
                mask = mask & (rows < end - start)
            tile = tl.load(address, mask=mask, other=0.0)
        elif MASKED:
            tile = tl.load(address, mask=rows < end - start, other=0.0)
        else:
            tile = tl.load(address)
    return tile


@jit
def store_base(target, batch, head, batch_stride, head_stride):
    """Return a pointer to one head of one sequence of an output tensor, whose strides are in elements."""
    return target + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@jit
def store_tile(
    base, tile, start, end, token_stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store (ROWS, WIDTH) from token `start` on, up to the head dim and the token `end`."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    address = base + tl.cast(start, tl.int64) * token_stride + rows[:, None] * token_stride + columns[None, :]
    mask = (rows < end - start)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(address, tile.to(base.dtype.element_ty), mask=mask)
