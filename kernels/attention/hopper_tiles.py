"""Functions shared by the Hopper kernels: the order of tiles, and the ring of buffers."""

from ..dispatch import tl
from .gluon import gl, gluon, mbarrier, tma
from .intervals import mask_of
from .scores import load_lse
from .tiles import program_of


@gluon.jit
def stage_of(i, STAGES: tl.constexpr):
    """Return the ring buffer's index and the barrier phase of the i-th tile."""
    return i % STAGES, i // STAGES & 1


@gluon.jit
def num_tiles_of(tiles, BLOCK: tl.constexpr):
    """Return the number of tiles of a program: all of `tiles_of`, or a single, fully masked one if there are none."""
    return gl.maximum(tiles[4] + (tiles[3] - tiles[2]) // BLOCK, 1)


@gluon.jit
def tile_at(i, tiles, BLOCK: tl.constexpr):
    """Return the start of the i-th tile. Masked tiles come first."""
    start, left, full_start, full_end, masked = tiles
    at_side = gl.where(i < left, start + i * BLOCK, full_end + (i - left) * BLOCK)
    return gl.where(i < masked, at_side, full_start + (i - masked) * BLOCK)


@gluon.jit
def opaque(values, zero):
    """Return a tuple of integers combined with `later_zero`, so that the compiler cannot compute their uses earlier."""
    result = (values[0] | zero,)
    for i in gl.static_range(1, len(values)):
        result = result + (values[i] | zero,)  # noqa: RUF005 - Triton has no tuple unpacking
    return result


@gluon.jit
def place_of(program, sizes, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """Return the (first query, row, batch, head, kv_head) of a program."""
    num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once, document_stride = sizes
    tile, row = program_of(program, gl.num_programs(0) // num_rows, num_rows, rows_at_once, CAUSAL)
    head = row % num_heads
    return tile * BLOCK_M, row, row // num_heads, head, head // group_size


@gluon.jit
def mask_at(batch, sizes, masks, LENGTHS: tl.constexpr):
    """Return the mask of one sequence (see `mask_of`)."""
    num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once, document_stride = sizes
    begins_ptr, ends_ptr, lengths_ptr = masks
    return mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )


@gluon.jit
def load_queries(
    i, batch, head, row, m, num_queries, q_desc, do_desc, statistics, tiles, ready, free, STAGES: tl.constexpr,
):  # fmt: skip
    """Load q, do, lse and delta of the i-th tile for the dK/dV kernels: queries from `m` on of one row (batch and head)."""
    q_tiles, do_tiles, lse_tiles, delta_tiles = tiles
    q_ready, do_ready = ready
    lse_ptr, delta_ptr = statistics
    BLOCK_M: tl.constexpr = q_tiles.shape[1]
    LANES: tl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    stage, phase = stage_of(i, STAGES)
    place = [batch, head, m, 0]
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(q_ready.index(stage), q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, place, q_ready.index(stage), q_tiles.index(stage))
    mbarrier.expect(do_ready.index(stage), do_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(do_desc, place, do_ready.index(stage), do_tiles.index(stage))
    # lse and delta are too small for a TMA copy of their own, so they are copied through registers.
    queries = m + gl.arange(0, BLOCK_M, LANES)
    offset = gl.cast(row, gl.int64) * num_queries
    lse_tiles.index(stage).store(load_lse(lse_ptr + offset, queries, num_queries))
    mbarrier.arrive(q_ready.index(stage))
    delta_tiles.index(stage).store(gl.load(delta_ptr + offset + queries, mask=queries < num_queries, other=0.0))
    mbarrier.arrive(do_ready.index(stage))


@gluon.jit
def store_sums(base, x, start, end, token_stride, HEAD_DIM: tl.constexpr, LAYOUT: tl.constexpr):
    """Store an accumulator (M, K) as rows from `start` on, up to row `end` and the head dim."""
    rows = start + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
    channels = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    address = base + (rows.to(gl.int64) * token_stride)[:, None] + channels[None, :]
    gl.store(address, x.to(base.dtype.element_ty), mask=(rows < end)[:, None] & (channels < HEAD_DIM)[None, :])
