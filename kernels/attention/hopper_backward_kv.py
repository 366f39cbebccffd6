"""The dK/dV kernel for Hopper, in Gluon: warps specialize as in `hopper_forward`, with four products a tile."""

from ..dispatch import tl
from .gluon import gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .hopper_isolated import has_nan, store_isolated_dk_dv
from .hopper_tiles import load_queries, mask_at, opaque, stage_of, store_sums
from .intervals import key_tiles, queries_of
from .isolated import later_zero
from .scores import probabilities_of
from .tiles import SIZES, head_and_place, load_base, program_of, store_base


@gluon.jit
def place_of(program, sizes, num_parts, BLOCK_N: tl.constexpr):
    """Return the (first key, part, kv_head, batch) of a program."""
    num_rows, num_kv_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once, document_stride = sizes
    tile, row = program_of(program, gl.num_programs(0) // num_rows, num_rows, rows_at_once, False)
    return tile * BLOCK_N, row % num_parts, row // num_parts % num_kv_heads, row // num_parts // num_kv_heads


@gluon.jit
def tiles_at(first, mask, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (left_start, left, full_start, full_end, masked), the tiles of queries that see the keys from `first` on."""
    left_start, left, full_start, full_end, masked = key_tiles(first, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N)
    if LENGTHS:
        # No query sees a key beyond the sequence's length.
        full_end = gl.where(first < mask[1], full_end, full_start)
        masked = gl.where(first < mask[1], masked, 0)
    return left_start, left, full_start, full_end, masked


@gluon.jit
def tile_at(i, tiles, group_size, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the head within its group and the first query of the i-th tile. Masked tiles of all heads come first."""
    left_start, left, full_start, full_end, masked = tiles
    num_masked = masked * group_size
    if i < num_masked:
        head, place = head_and_place(i, masked, 0, GROUPED)
        m = gl.where(place < left, left_start + place * BLOCK_M, full_end + (place - left) * BLOCK_M)
    else:
        head, place = head_and_place(i - num_masked, (full_end - full_start) // BLOCK_M, 0, GROUPED)
        m = full_start + place * BLOCK_M
    return head, m


@gluon.jit
def add_tile(
    i, k, v, buffers, barriers, dk, dv, zeros, start, low, high,
    scale: tl.constexpr, softcap: tl.constexpr, MASKED: tl.constexpr, HIGH: tl.constexpr, STAGES: tl.constexpr,
    S_LAYOUT: tl.constexpr, DK_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the i-th tile of queries, from `start` on, to dk and dv (N, K). The caller scales dk."""
    q_tiles, do_tiles, lse_tiles, delta_tiles = buffers
    q_ready, do_ready, free = barriers
    COLUMNS: tl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    P_LAYOUT: tl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, 2)
    stage, phase = stage_of(i, STAGES)
    q, do = q_tiles.index(stage), do_tiles.index(stage)
    mbarrier.wait(q_ready.index(stage), phase)
    # Scores are transposed, (N, M), so that they multiply do and q directly from registers.
    products = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_ready.index(stage), phase)
    dps = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse_tiles.index(stage).load(COLUMNS)
    p, slope = probabilities_of(warpgroup_mma_wait(1, (products,)), lse[None, :], scale, softcap)
    if MASKED:
        queries = (start + gl.arange(0, q.shape[0], COLUMNS))[None, :]
        seen = queries >= low[:, None]
        if HIGH:
            seen = seen & (queries < high[:, None])
        p = gl.where(seen, p, 0.0)
    probabilities = gl.convert_layout(p.to(do.dtype), P_LAYOUT)
    dvs = warpgroup_mma(probabilities, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, (dps,))
    ds = p * (dp - delta_tiles.index(stage).load(COLUMNS)[None, :]) * slope
    ds = gl.convert_layout(ds.to(q.dtype), P_LAYOUT)
    dks = warpgroup_mma(ds, q, dk, is_async=True)
    dv, probabilities, dk, ds = warpgroup_mma_wait(0, (dvs, probabilities, dks, ds))
    mbarrier.arrive(free.index(stage))
    return dk, dv


@gluon.jit
def consume(
    k_tiles, v_tiles, kv_ready, buffers, barriers, pointers, statistics, masks, strides, sizes, parts,
    GROUP: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of the 64 keys of one warp group."""
    BLOCK_K: tl.constexpr = k_tiles.shape[2]
    BLOCK_N: tl.constexpr = 64 * GROUPS
    S_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DK_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    ROWS: tl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    # A causal mask alone needs no upper bound: every query from `low` on sees the key.
    HIGH: tl.constexpr = WINDOW or DOCUMENTS > 0
    first, part, kv_head, batch = place_of(gl.program_id(0), sizes, parts[0], BLOCK_N)
    mask = mask_at(batch, sizes, masks, LENGTHS)
    tiles = tiles_at(first, mask, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, BLOCK_M, BLOCK_N)
    keys = first + GROUP * 64 + gl.arange(0, 64, ROWS)
    low, high = queries_of(keys, mask, CAUSAL, WINDOW, DOCUMENTS)
    group_size = sizes[2]
    masked = tiles[4] * group_size
    num_tiles = masked + (tiles[3] - tiles[2]) // BLOCK_M * group_size

    k, v = k_tiles.index(GROUP), v_tiles.index(GROUP)
    dk = gl.zeros([64, BLOCK_K], gl.float32, DK_LAYOUT)
    dv = gl.zeros([64, BLOCK_K], gl.float32, DK_LAYOUT)
    zeros = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    mbarrier.wait(kv_ready, 0)
    for i in range(masked):
        head, m = tile_at(i, tiles, group_size, GROUPED, BLOCK_M)
        dk, dv = add_tile(
            i, k, v, buffers, barriers, dk, dv, zeros, m, low, high,
            scale, softcap, True, HIGH, STAGES, S_LAYOUT, DK_LAYOUT,
        )  # fmt: skip
    for i in range(masked, num_tiles):
        dk, dv = add_tile(
            i, k, v, buffers, barriers, dk, dv, zeros, 0, low, high,
            scale, softcap, False, HIGH, STAGES, S_LAYOUT, DK_LAYOUT,
        )  # fmt: skip

    again = gl.maximum(has_nan(dk), has_nan(dv))
    zero = later_zero(again)
    sizes, strides = opaque(sizes, zero), opaque(strides, zero)
    num_parts, dk_part_stride, dv_part_stride = opaque(parts, zero)
    first, part, kv_head, batch = place_of(gl.program_id(0) | zero, sizes, num_parts, BLOCK_N)
    start = first + GROUP * 64
    num_keys = sizes[4]
    mask = mask_at(batch, sizes, masks, LENGTHS)
    dk_part = gl.cast(part, gl.int64) * dk_part_stride
    dv_part = gl.cast(part, gl.int64) * dv_part_stride
    dk_base, dv_base, dk_token_stride, dv_token_stride = outputs_of(pointers, strides, dk_part, dv_part, batch, kv_head)
    if again > 0:
        lse_ptr, delta_ptr = statistics
        group_size = sizes[2]
        num_heads = sizes[1] * num_parts * group_size
        first_head = (kv_head * num_parts + part) * group_size
        first_row = gl.cast(batch * num_heads + first_head, gl.int64) * sizes[3]
        store_isolated_dk_dv(
            inputs_of(pointers, strides, batch, first_head, kv_head), dk_base, dv_base,
            lse_ptr + first_row, delta_ptr + first_row, strides, dk_token_stride, dv_token_stride, group_size,
            start, gl.minimum(start + 64, num_keys), mask,
            scale, softcap, CAUSAL, WINDOW, DOCUMENTS, HEAD_DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip
    else:
        if LENGTHS:
            # No query sees a key beyond the length, but a tile's bounds come only from its first and last key.
            present = (start + gl.arange(0, 64, gl.SliceLayout(1, DK_LAYOUT)) < mask[1])[:, None]
            dk = gl.where(present, dk, 0.0)
            dv = gl.where(present, dv, 0.0)
        store_sums(dk_base, dk * scale, start, num_keys, dk_token_stride, HEAD_DIM, DK_LAYOUT)
        store_sums(dv_base, dv, start, num_keys, dv_token_stride, VALUE_DIM, DK_LAYOUT)


@gluon.jit
def inputs_of(pointers, strides, batch, head, kv_head):
    """Return where the heads of q, k, v and do begin, the first query head of a group among them."""
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr = pointers
    return (
        load_base(q_ptr, batch, head, strides[0], strides[1], False),
        load_base(k_ptr, batch, kv_head, strides[3], strides[4], False),
        load_base(v_ptr, batch, kv_head, strides[6], strides[7], False),
        load_base(do_ptr, batch, head, strides[9], strides[10], False),
    )


@gluon.jit
def outputs_of(pointers, strides, dk_part, dv_part, batch, kv_head):
    """Return where the heads of dk and dv begin in a part of them, and how far apart their tokens are."""
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr = pointers
    dk_base = store_base(dk_ptr + dk_part, batch, kv_head, strides[12], strides[13])
    dv_base = store_base(dv_ptr + dv_part, batch, kv_head, strides[15], strides[16])
    return dk_base, dv_base, strides[14], strides[17]


@gluon.jit
def produce(
    k_tiles, v_tiles, kv_ready, buffers, barriers, q_desc, k_desc, v_desc, do_desc, statistics, masks, sizes, num_parts,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, GROUPED: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Load the keys and values, then the queries tile by tile with what belongs to them."""
    q_ready, do_ready, free = barriers
    first, part, kv_head, batch = place_of(gl.program_id(0), sizes, num_parts, 64 * GROUPS)
    mask = mask_at(batch, sizes, masks, LENGTHS)
    tiles = tiles_at(first, mask, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, BLOCK_M, 64 * GROUPS)
    num_queries, group_size = sizes[3], sizes[2]
    mbarrier.expect(kv_ready, GROUPS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for group in gl.static_range(GROUPS):
        place = [batch, kv_head, first + group * 64, 0]
        tma.async_copy_global_to_shared(k_desc, place, kv_ready, k_tiles.index(group))
        tma.async_copy_global_to_shared(v_desc, place, kv_ready, v_tiles.index(group))
    first_head = (kv_head * num_parts + part) * group_size
    first_row = batch * (sizes[1] * num_parts * group_size) + first_head
    for i in range((tiles[4] + (tiles[3] - tiles[2]) // BLOCK_M) * group_size):
        head, m = tile_at(i, tiles, group_size, GROUPED, BLOCK_M)
        load_queries(
            i, batch, first_head + head, first_row + head, m, num_queries, q_desc, do_desc, statistics, buffers,
            (q_ready, do_ready), free, STAGES,
        )  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def attention_backward_kv_hopper(
    q, k, v, do, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride, dv_batch_stride, dv_head_stride, dv_token_stride, document_stride,
    num_rows, num_kv_heads, num_parts, dk_part_stride, dv_part_stride, group_size,
    num_queries, num_keys, window_left, window_right, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, PRECISION: tl.constexpr, GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of one key-value head, 64 keys a warp group, from the query heads of one part."""
    BLOCK_K: tl.constexpr = q.block_type.shape[3]
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], q.dtype)
    LINE: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: tl.constexpr = mbarrier.MBarrierLayout()
    k_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
    v_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, BLOCK_K], TILE)
    do_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, BLOCK_K], TILE)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], LINE)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], LINE)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_ready, count=1)
    for i in gl.static_range(STAGES):
        # One arrival for the TMA copy, one for the statistics copied through registers.
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(do_ready.index(i), count=2)
        mbarrier.init(free.index(i), count=GROUPS)

    buffers = (q_tiles, do_tiles, lse_tiles, delta_tiles)
    barriers = (q_ready, do_ready, free)
    pointers = (q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr)
    statistics = (lse_ptr, delta_ptr)
    masks = (begins_ptr, ends_ptr, lengths_ptr)
    strides = (
        q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
        v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
        dk_batch_stride, dk_head_stride, dk_token_stride, dv_batch_stride, dv_head_stride, dv_token_stride,
    )  # fmt: skip
    sizes = (
        num_rows, num_kv_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once, document_stride,
    )  # fmt: skip
    parts = (num_parts, dk_part_stride, dv_part_stride)
    gl.warp_specialize([
        (consume, (k_tiles, v_tiles, kv_ready, buffers, barriers, pointers, statistics, masks, strides, sizes, parts, 0, scale,
                   softcap, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, GROUPED, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_M, STAGES)),
        (consume, (k_tiles, v_tiles, kv_ready, buffers, barriers, pointers, statistics, masks, strides, sizes, parts, 1, scale,
                   softcap, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, GROUPED, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_M, STAGES)),
        (produce, (k_tiles, v_tiles, kv_ready, buffers, barriers, q, k, v, do, statistics, masks, sizes, num_parts, CAUSAL,
                   WINDOW, DOCUMENTS, LENGTHS, GROUPED, GROUPS, BLOCK_M, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
