"""The fused backward kernel of causal attention for Hopper, in Gluon: five products a tile; two kernels need seven.

It is `hopper_backward_kv` with one more product, dQ. The programs that own the keys of a tile of queries add their parts of dQ
in float32, in a fixed order (see `hopper_turns`).
"""

from ..dispatch import tl
from .gluon import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .hopper_isolated import has_nan
from .hopper_tiles import load_queries, opaque, stage_of, store_sums
from .hopper_turns import add_dq, begin_turns, end_turns, num_tiles_of, place_of, tile_at
from .isolated import later_zero
from .scores import probabilities_of
from .tiles import SIZES, store_base


@gluon.jit
def add_tile(
    i, tile, k_tiles, v, buffers, barriers, dk, dv, zeros, sums_ptr,
    GROUP: tl.constexpr, scale: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, S_LAYOUT: tl.constexpr,
    DK_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the i-th tile of queries, the `tile`-th of its head, to dk, dv (N, K) and dQ, before scaling."""
    q_tiles, do_tiles, lse_tiles, delta_tiles, ds_tiles = buffers
    q_ready, do_ready, free, ds_ready, dq_free, dq_done = barriers
    BLOCK_M: tl.constexpr = q_tiles.shape[1]
    COLUMNS: tl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    P_LAYOUT: tl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, 2)
    stage, phase = stage_of(i, STAGES)
    q, do = q_tiles.index(stage), do_tiles.index(stage)
    mbarrier.wait(q_ready.index(stage), phase)
    products = warpgroup_mma(k_tiles.index(GROUP), q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_ready.index(stage), phase)
    dps = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse_tiles.index(stage).load(COLUMNS)
    p, slope = probabilities_of(warpgroup_mma_wait(1, (products,)), lse[None, :], scale, None)
    # Queries and keys are counted from the program's first key, so only the first tiles of a head need a mask.
    masked = tile * BLOCK_M < 64 * GROUPS
    if masked:
        queries = tile * BLOCK_M + gl.arange(0, BLOCK_M, COLUMNS)
        keys = GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))
        p = gl.where(queries[None, :] >= keys[:, None], p, 0.0)
    probabilities = gl.convert_layout(p.to(do.dtype), P_LAYOUT)
    dvs = warpgroup_mma(probabilities, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, (dps,))
    ds = p * (dp - delta_tiles.index(stage).load(COLUMNS)[None, :])
    ds = ds.to(q.dtype)
    # Each group multiplies dS of all keys by its own channels of K, so the groups exchange dS through shared memory.
    slot, turn = stage_of(i, 2)
    ds_tiles.index(slot * GROUPS + GROUP).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_ready.index(slot))
    ds = gl.convert_layout(ds, P_LAYOUT)
    dks = warpgroup_mma(ds, q, dk, is_async=True)
    # Waiting for dV frees the registers of the probabilities.
    dv, probabilities = warpgroup_mma_wait(1, (dvs, probabilities))
    mbarrier.wait(ds_ready.index(slot), turn)
    channels = k_tiles.index(0).slice(GROUP * 64, 64, 1).permute((1, 0))
    dqs = warpgroup_mma(channels, ds_tiles.index(slot * GROUPS), zeros, use_acc=False, is_async=True)
    for other in gl.static_range(1, GROUPS):
        channels = k_tiles.index(other).slice(GROUP * 64, 64, 1).permute((1, 0))
        dqs = warpgroup_mma(channels, ds_tiles.index(slot * GROUPS + other), dqs, is_async=True)
    dk, ds, dq = warpgroup_mma_wait(0, (dks, ds, dqs))
    mbarrier.arrive(free.index(stage))
    # In a masked tile this program owns the last visible keys, so it takes the first turn.
    add_dq(i, dq, sums_ptr, dq_free, dq_done, masked)
    return dk, dv


@gluon.jit
def consume(
    k_tiles, v_tiles, kv_ready, buffers, barriers, pointers, sums_ptr, strides, sizes, part_strides,
    GROUP: tl.constexpr, scale: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of the 64 keys of one warp group, and add its 64 channels of dQ."""
    BLOCK_K: tl.constexpr = k_tiles.shape[2]
    BLOCK_N: tl.constexpr = 64 * GROUPS
    S_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DK_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    TILE_SUMS: tl.constexpr = BLOCK_M * BLOCK_K
    first, first_row, first_head, kv_head, batch = place_of(gl.program_id(0), sizes, BLOCK_N)
    num_tiles = num_tiles_of(first, sizes, BLOCK_M)
    group_size, num_tokens = sizes[3], sizes[4]
    # Sums of the queries before the program's keys, skipped in each head.
    passed = first // BLOCK_M * TILE_SUMS
    sums_ptr += gl.cast(first_row, gl.int64) * (gl.cdiv(num_tokens, BLOCK_M) * TILE_SUMS) + GROUP * 64 * BLOCK_M

    v = v_tiles.index(GROUP)
    dk = gl.zeros([64, BLOCK_K], gl.float32, DK_LAYOUT)
    dv = gl.zeros([64, BLOCK_K], gl.float32, DK_LAYOUT)
    zeros = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    mbarrier.wait(kv_ready, 0)
    # A single loop with an integer offset instead of a pointer: other forms spill registers.
    tile = 0
    place = passed
    for i in range(num_tiles * group_size):
        dk, dv = add_tile(
            i, tile, k_tiles, v, buffers, barriers, dk, dv, zeros, sums_ptr + place,
            GROUP, scale, GROUPS, STAGES, S_LAYOUT, DK_LAYOUT,
        )  # fmt: skip
        tile += 1
        place += TILE_SUMS
        if tile == num_tiles:
            tile = 0
            place += passed

    # Recomputed from the arguments, so that these values occupy no registers in the loop.
    zero = later_zero(has_nan(dk))
    sizes, strides = opaque(sizes, zero), opaque(strides, zero)
    dk_part_stride, dv_part_stride = opaque(part_strides, zero)
    first, first_row, first_head, kv_head, batch = place_of(gl.program_id(0) | zero, sizes, BLOCK_N)
    group_size, num_tokens = sizes[3], sizes[4]
    part = gl.cast(first_head // group_size % sizes[2], gl.int64)
    dk_ptr, dv_ptr = pointers
    dk_base = store_base(dk_ptr + part * dk_part_stride, batch, kv_head, strides[0], strides[1])
    dv_base = store_base(dv_ptr + part * dv_part_stride, batch, kv_head, strides[3], strides[4])
    start = first + GROUP * 64
    store_sums(dk_base, dk * scale, start, num_tokens, strides[2], HEAD_DIM, DK_LAYOUT)
    store_sums(dv_base, dv, start, num_tokens, strides[5], VALUE_DIM, DK_LAYOUT)


@gluon.jit
def produce(
    k_tiles, v_tiles, kv_ready, buffers, barriers, q_desc, k_desc, v_desc, do_desc, statistics, sizes,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Load the keys and values, then q, do, lse and delta tile by tile."""
    q_tiles, do_tiles, lse_tiles, delta_tiles, ds_tiles = buffers
    q_ready, do_ready, free, ds_ready, dq_free, dq_done = barriers
    first, first_row, first_head, kv_head, batch = place_of(gl.program_id(0), sizes, 64 * GROUPS)
    num_tiles = num_tiles_of(first, sizes, BLOCK_M)
    group_size, num_tokens = sizes[3], sizes[4]
    mbarrier.expect(kv_ready, GROUPS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for group in gl.static_range(GROUPS):
        place = [batch, kv_head, first + group * 64, 0]
        tma.async_copy_global_to_shared(k_desc, place, kv_ready, k_tiles.index(group))
        tma.async_copy_global_to_shared(v_desc, place, kv_ready, v_tiles.index(group))
    for i in range(num_tiles * group_size):
        head, m = tile_at(i, first, num_tiles, BLOCK_M)
        load_queries(
            i, batch, first_head + head, first_row + head, m, num_tokens, q_desc, do_desc, statistics,
            (q_tiles, do_tiles, lse_tiles, delta_tiles), (q_ready, do_ready), free, STAGES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=(*SIZES, "num_tokens"))
def attention_backward_hopper(
    q, k, v, do, lse_ptr, delta_ptr, dk_ptr, dv_ptr, sums_ptr, counters_ptr,
    dk_batch_stride, dk_head_stride, dk_token_stride, dv_batch_stride, dv_head_stride, dv_token_stride,
    num_rows, num_kv_heads, num_parts, dk_part_stride, dv_part_stride, group_size, num_tokens, rows_at_once,
    scale: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of one key-value head, 64 keys a warp group, from the query heads of one part; add to dQ."""
    BLOCK_K: tl.constexpr = q.block_type.shape[3]
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], q.dtype)
    DS: tl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], q.dtype)
    LINE: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: tl.constexpr = mbarrier.MBarrierLayout()
    gl.static_assert(BLOCK_K == 64 * GROUPS, "each group has 64 channels of dQ")
    k_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
    v_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, BLOCK_K], TILE)
    do_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, BLOCK_K], TILE)
    # Double-buffered: dS of two tiles of queries, one slot a warp group.
    ds_tiles = gl.allocate_shared_memory(q.dtype, [2 * GROUPS, 64, BLOCK_M], DS)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], LINE)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], LINE)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_done = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        # One arrival for the TMA copy, one for the statistics copied through registers.
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(do_ready.index(i), count=2)
        mbarrier.init(free.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(ds_ready.index(i), count=GROUPS)
        # One arrival from `begin_turns`, one from `end_turns`.
        mbarrier.init(dq_free.index(i), count=2)
        mbarrier.init(dq_done.index(i), count=GROUPS)

    buffers = (q_tiles, do_tiles, lse_tiles, delta_tiles, ds_tiles)
    barriers = (q_ready, do_ready, free, ds_ready, dq_free, dq_done)
    pointers = (dk_ptr, dv_ptr)
    statistics = (lse_ptr, delta_ptr)
    strides = (dk_batch_stride, dk_head_stride, dk_token_stride, dv_batch_stride, dv_head_stride, dv_token_stride)
    sizes = (num_rows, num_kv_heads, num_parts, group_size, num_tokens, rows_at_once)
    part_strides = (dk_part_stride, dv_part_stride)
    gl.warp_specialize([
        (consume, (k_tiles, v_tiles, kv_ready, buffers, barriers, pointers, sums_ptr, strides, sizes, part_strides, 0, scale,
                   HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_M, STAGES)),
        (consume, (k_tiles, v_tiles, kv_ready, buffers, barriers, pointers, sums_ptr, strides, sizes, part_strides, 1, scale,
                   HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_M, STAGES)),
        (produce, (k_tiles, v_tiles, kv_ready, buffers, barriers, q, k, v, do, statistics, sizes, GROUPS, BLOCK_M, STAGES)),
        (begin_turns, (counters_ptr, barriers, sizes, GROUPS, BLOCK_M)),
        (end_turns, (counters_ptr, barriers, sizes, GROUPS, BLOCK_M)),
    ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
