"""How tiles reach a program: which one is whose, and how a tile is loaded, through pointers or a TMA descriptor."""

from ..dispatch import jit, tl

# Arguments whose divisibility helps no load: without this, each new length of a growing cache could mean a new compilation.
SIZES = (
    "num_rows", "num_heads", "num_kv_heads", "num_queries", "num_keys", "window_left", "window_right", "rows_at_once",
    "num_splits", "num_parts", "document_stride",
)  # fmt: skip


@jit
def program_of(program, num_tiles, num_rows, rows_at_once, LAST_FIRST: tl.constexpr):
    """Return (tile, row) of a program, where `num_rows` rows (batch and head) have `num_tiles` tiles each.

    Programs that run at the same time share the keys and values of `rows_at_once` rows, which fit in the L2 cache together.
    Under a causal mask tiles differ in work: the longest begin first, so that the last to end are short.
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
    """Return the head that the i-th tile belongs to, and the tile's place there, where heads have `num_tiles` tiles each."""
    head = first_head
    place = i
    if GROUPED:
        # The pipeline may compute the first of these even where there is none.
        head += i // tl.maximum(num_tiles, 1)
        place = i % tl.maximum(num_tiles, 1)
    return head, place


@jit
def stride_unit(source):
    """Return in how many elements the strides of a tensor that is loaded are given: see `load_strides`."""
    return 8 if source.dtype.element_ty.primitive_bitwidth == 16 else 1


@jit
def load_base(source, batch, head, batch_stride, head_stride, TMA: tl.constexpr):
    """Return where a head of one sequence begins; a descriptor has no pointer and stays what it is."""
    if not TMA:
        offset = tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        source = source + offset * stride_unit(source)
    return source


@jit
def load_tile(
    base, batch, head, start, end, token_stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load (ROWS, WIDTH) of a head from token `start` on; 0 beyond the head dim and, if MASKED, from token `end` on."""
    if TMA:
        # The hardware fills what lies outside with 0.
        tile = base.load([batch, head, start, 0]).reshape(ROWS, WIDTH)
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, WIDTH)[None, :]
        stride = token_stride * stride_unit(base)
        # 64 bits once a tile; within it 32 bits do, and keep the registers.
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
    """Return where a head of one sequence begins in a tensor to be written, whose strides are in elements."""
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
