"""The dQ kernel for Hopper, in Gluon: warps specialize as in `hopper_forward`, with three products a tile."""

from ..dispatch import tl
from .gluon import gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .hopper_isolated import has_nan, load_rows, store_isolated_dq
from .hopper_tiles import mask_at, num_tiles_of, opaque, place_of, stage_of, store_sums, tile_at
from .intervals import keys_of, query_tiles
from .isolated import later_zero
from .scores import load_lse, probabilities_of
from .tiles import SIZES, load_base, store_base


@gluon.jit
def add_tile(
    i, q, do, k_tiles, v_tiles, barriers, dq, lse, delta, zeros, start, low, high,
    scale: tl.constexpr, softcap: tl.constexpr, MASKED: tl.constexpr, LOW: tl.constexpr, STAGES: tl.constexpr,
    S_LAYOUT: tl.constexpr, DQ_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return unscaled dq (M, K) plus the contribution of the i-th tile of keys, from `start` on."""
    k_ready, k_free, v_ready, v_free = barriers
    stage, phase = stage_of(i, STAGES)
    mbarrier.wait(k_ready.index(stage), phase)
    products = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(stage), phase)
    dps = warpgroup_mma(do, v_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    p, slope = probabilities_of(warpgroup_mma_wait(1, (products,)), lse[:, None], scale, softcap)
    dp = warpgroup_mma_wait(0, (dps,))
    mbarrier.arrive(v_free.index(stage))
    ds = p * (dp - delta[:, None]) * slope
    if MASKED:
        # Mask after the multiplication, because 0 times a non-finite dP is NaN.
        keys = (start + gl.arange(0, ds.shape[1], gl.SliceLayout(0, S_LAYOUT)))[None, :]
        seen = keys < high[:, None]
        if LOW:
            seen = seen & (keys >= low[:, None])
        ds = gl.where(seen, ds, 0.0)
    ds = gl.convert_layout(ds.to(k_tiles.dtype), gl.DotOperandLayout(0, DQ_LAYOUT, 2))
    dq, ds = warpgroup_mma_wait(0, (warpgroup_mma(ds, k_tiles.index(stage), dq, is_async=True), ds))
    mbarrier.arrive(k_free.index(stage))
    return dq


@gluon.jit
def delta_of(bases, token_strides, start, end, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Return sum_j P_ij dP_ij = do_i o_i (Dao 2023, section 3.1) of the 64 queries from `start` on."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = start + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    delta = gl.zeros([64], gl.float32, gl.SliceLayout(1, LAYOUT))
    for channel in gl.static_range(0, WIDTH, 64):
        channels = channel + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
        o = load_rows(bases[4], rows, end, token_strides[4], channels, VALUE_DIM)
        delta += gl.sum(o * load_rows(bases[3], rows, end, token_strides[3], channels, VALUE_DIM), 1)
    return delta


@gluon.jit
def consume(
    buffers, barriers, pointers, statistics, masks, strides, sizes,
    GROUP: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq and delta of the 64 queries of one warp group."""
    q_tiles, do_tiles, k_tiles, v_tiles = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    lse_ptr, dlse_ptr, delta_ptr = statistics
    BLOCK_K: tl.constexpr = q_tiles.shape[2]
    BLOCK_M: tl.constexpr = 64 * GROUPS
    S_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    ROWS: tl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # A causal mask alone needs no lower bound on the keys.
    LOW: tl.constexpr = WINDOW or DOCUMENTS > 0
    first, row, batch, head, kv_head = place_of(gl.program_id(0), sizes, BLOCK_M, CAUSAL)
    mask = mask_at(batch, sizes, masks, LENGTHS)
    tiles = query_tiles(first, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N)
    start = first + GROUP * 64
    queries = start + gl.arange(0, 64, ROWS)

    bases, token_strides = bases_of(pointers, strides, batch, head, kv_head)
    delta = gl.convert_layout(delta_of(bases, token_strides, start, mask[0], VALUE_DIM, BLOCK_K), ROWS)
    offsets = gl.cast(row, gl.int64) * mask[0] + queries
    # A gradient dlse_i adds P_ij dlse_i to each dS_ij.
    if DLSE:
        delta -= gl.load(dlse_ptr + offsets, mask=queries < mask[0], other=0.0)
    lse = load_lse(lse_ptr + gl.cast(row, gl.int64) * mask[0], queries, mask[0])
    # A query without keys has an lse of -inf; its gradient reaches no input.
    delta = gl.where(lse == float("inf"), 0.0, delta)
    gl.store(delta_ptr + offsets, delta, mask=queries < mask[0])

    low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
    num_tiles = num_tiles_of(tiles, BLOCK_N)
    masked = gl.maximum(tiles[4], num_tiles - (tiles[3] - tiles[2]) // BLOCK_N)
    q, do = q_tiles.index(GROUP), do_tiles.index(GROUP)
    dq = gl.zeros([64, BLOCK_K], gl.float32, DQ_LAYOUT)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    ring = (k_ready, k_free, v_ready, v_free)
    mbarrier.wait(q_ready, 0)
    for i in range(masked):
        dq = add_tile(
            i, q, do, k_tiles, v_tiles, ring, dq, lse, delta, zeros, tile_at(i, tiles, BLOCK_N), low, high,
            scale, softcap, True, LOW, STAGES, S_LAYOUT, DQ_LAYOUT,
        )  # fmt: skip
    for i in range(masked, num_tiles):
        dq = add_tile(
            i, q, do, k_tiles, v_tiles, ring, dq, lse, delta, zeros, 0, low, high,
            scale, softcap, False, LOW, STAGES, S_LAYOUT, DQ_LAYOUT,
        )  # fmt: skip

    again = has_nan(dq)
    zero = later_zero(again)
    sizes, strides = opaque(sizes, zero), opaque(strides, zero)
    first, row, batch, head, kv_head = place_of(gl.program_id(0) | zero, sizes, BLOCK_M, CAUSAL)
    start = first + GROUP * 64
    bases, token_strides = bases_of(pointers, strides, batch, head, kv_head)
    num_queries = sizes[3]
    if again > 0:
        statistics_row = gl.cast(row, gl.int64) * num_queries
        store_isolated_dq(
            bases, token_strides, lse_ptr + statistics_row, delta_ptr + statistics_row,
            start, gl.minimum(start + 64, num_queries), mask_at(batch, sizes, masks, LENGTHS),
            scale, softcap, CAUSAL, WINDOW, DOCUMENTS, HEAD_DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip
    else:
        store_sums(bases[5], dq * scale, start, num_queries, token_strides[5], HEAD_DIM, DQ_LAYOUT)


@gluon.jit
def bases_of(pointers, strides, batch, head, kv_head):
    """Return the base pointers of the heads of q, k, v, do, o and dq, and their token strides."""
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr = pointers
    bases = (
        load_base(q_ptr, batch, head, strides[0], strides[1], False),
        load_base(k_ptr, batch, kv_head, strides[3], strides[4], False),
        load_base(v_ptr, batch, kv_head, strides[6], strides[7], False),
        load_base(do_ptr, batch, head, strides[9], strides[10], False),
        load_base(o_ptr, batch, head, strides[12], strides[13], False),
        store_base(dq_ptr, batch, head, strides[15], strides[16]),
    )
    return bases, (strides[2], strides[5], strides[8], strides[11], strides[14], strides[17])


@gluon.jit
def produce(
    buffers, barriers, q_desc, k_desc, v_desc, do_desc, masks, sizes,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Load the queries and the gradient of their output, then the keys and values tile by tile."""
    q_tiles, do_tiles, k_tiles, v_tiles = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    first, row, batch, head, kv_head = place_of(gl.program_id(0), sizes, 64 * GROUPS, CAUSAL)
    tiles = query_tiles(first, mask_at(batch, sizes, masks, LENGTHS), CAUSAL, WINDOW, DOCUMENTS, 64 * GROUPS, BLOCK_N)
    mbarrier.expect(q_ready, GROUPS * (q_desc.block_type.nbytes + do_desc.block_type.nbytes))
    for group in gl.static_range(GROUPS):
        place = [batch, head, first + group * 64, 0]
        tma.async_copy_global_to_shared(q_desc, place, q_ready, q_tiles.index(group))
        tma.async_copy_global_to_shared(do_desc, place, q_ready, do_tiles.index(group))
    for i in range(num_tiles_of(tiles, BLOCK_N)):
        stage, phase = stage_of(i, STAGES)
        place = [batch, kv_head, tile_at(i, tiles, BLOCK_N), 0]
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, place, k_ready.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, place, v_ready.index(stage), v_tiles.index(stage))


@gluon.jit(do_not_specialize=SIZES)
def attention_backward_q_hopper(
    q, k, v, do, q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
    o_batch_stride, o_head_stride, o_token_stride, dq_batch_stride, dq_head_stride, dq_token_stride, document_stride,
    num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, PRECISION: tl.constexpr, DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dq and delta of a tile of 64 queries a group of one head, through descriptors of such parts."""
    BLOCK_K: tl.constexpr = q.block_type.shape[3]
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], q.dtype)
    BARRIER: tl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
    do_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
    k_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, BLOCK_K], TILE)
    v_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_N, BLOCK_K], TILE)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)

    buffers = (q_tiles, do_tiles, k_tiles, v_tiles)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    pointers = (q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr)
    statistics = (lse_ptr, dlse_ptr, delta_ptr)
    masks = (begins_ptr, ends_ptr, lengths_ptr)
    strides = (
        q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
        v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
        o_batch_stride, o_head_stride, o_token_stride, dq_batch_stride, dq_head_stride, dq_token_stride,
    )  # fmt: skip
    sizes = (num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once, document_stride)
    if GROUPS == 3:
        gl.warp_specialize([
            (consume, (buffers, barriers, pointers, statistics, masks, strides, sizes, 0, scale, softcap, CAUSAL, WINDOW,
                       DOCUMENTS, LENGTHS, DLSE, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (consume, (buffers, barriers, pointers, statistics, masks, strides, sizes, 1, scale, softcap, CAUSAL, WINDOW,
                       DOCUMENTS, LENGTHS, DLSE, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (consume, (buffers, barriers, pointers, statistics, masks, strides, sizes, 2, scale, softcap, CAUSAL, WINDOW,
                       DOCUMENTS, LENGTHS, DLSE, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (produce, (buffers, barriers, q, k, v, do, masks, sizes, CAUSAL, WINDOW, DOCUMENTS, LENGTHS,
                       GROUPS, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (buffers, barriers, pointers, statistics, masks, strides, sizes, 0, scale, softcap, CAUSAL, WINDOW,
                       DOCUMENTS, LENGTHS, DLSE, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (consume, (buffers, barriers, pointers, statistics, masks, strides, sizes, 1, scale, softcap, CAUSAL, WINDOW,
                       DOCUMENTS, LENGTHS, DLSE, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (produce, (buffers, barriers, q, k, v, do, masks, sizes, CAUSAL, WINDOW, DOCUMENTS, LENGTHS,
                       GROUPS, BLOCK_N, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip
