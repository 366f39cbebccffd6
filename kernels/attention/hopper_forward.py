"""The forward pass for Hopper, in Gluon: FlashAttention-3's warp specialization (Shah et al. 2024, algorithms 1 and 2).

One warp loads tiles of keys and values through TMA into a ring of buffers. Each group of four warps computes 64 queries. Within
a group, the softmax of a tile overlaps the product of the previous tile's probabilities and values. The groups drift apart, so
that one multiplies while another computes exponentials. They synchronize only through barriers in shared memory.
"""

from .. import shared
from ..dispatch import tl
from .gluon import fence_async_shared, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from .hopper_isolated import has_nan, store_isolated_output
from .hopper_tiles import mask_at, num_tiles_of, opaque, place_of, stage_of, tile_at
from .intervals import keys_of, query_tiles
from .isolated import later_zero
from .scores import scores_in_bits
from .tiles import SIZES, load_base, store_base


@gluon.jit
def softmax(s, row_max, row_sum, factor: tl.constexpr, MASKED: tl.constexpr):
    """Return (p (M, N), row_max, row_sum, rescale): exponentials, and the updated statistics of each row (M).

    `s` times `factor` are the scores in bits.
    """
    new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
    if MASKED:
        # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
        reference = gl.where(new_max == -float("inf"), 0.0, new_max)
    else:
        reference = new_max
    p = gl.exp2(s * factor - reference[:, None])
    rescale = gl.exp2(row_max - reference)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def masked_softmax(
    i, q, k_tiles, k_ready, k_free, row_max, row_sum, zeros, start, low, high,
    factor: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, DIRECT: tl.constexpr, LOW: tl.constexpr,
    STAGES: tl.constexpr, S_LAYOUT: tl.constexpr,
):  # fmt: skip
    """Return the `softmax` of the i-th tile, whose keys begin at `start`, with the mask applied."""
    stage, phase = stage_of(i, STAGES)
    mbarrier.wait(k_ready.index(stage), phase)
    scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, (scores,))
    mbarrier.arrive(k_free.index(stage))
    if not DIRECT:
        s = scores_in_bits(s, scale, softcap)
    keys = (start + gl.arange(0, s.shape[1], gl.SliceLayout(0, S_LAYOUT)))[None, :]
    seen = keys < high[:, None]
    if LOW:
        seen = seen & (keys >= low[:, None])
    return softmax(gl.where(seen, s, -float("inf")), row_max, row_sum, factor, True)


@gluon.jit
def bases_of(pointers, strides, batch, head, kv_head):
    """Return the base pointers of the heads of q, k, v and o, and their token strides."""
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr = pointers
    bases = (
        load_base(q_ptr, batch, head, strides[0], strides[1], False),
        load_base(k_ptr, batch, kv_head, strides[3], strides[4], False),
        load_base(v_ptr, batch, kv_head, strides[6], strides[7], False),
        store_base(o_ptr, batch, head, strides[9], strides[10]),
    )
    return bases, (strides[2], strides[5], strides[8], strides[11])


@gluon.jit
def consume(
    buffers, barriers, o_desc, pointers, masks, strides, sizes,
    GROUP: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write o and lse of the 64 queries of one warp group."""
    q_tiles, k_tiles, v_tiles = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    BLOCK_K: tl.constexpr = q_tiles.shape[2]
    S_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    P_LAYOUT: tl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: tl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: tl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    # A causal mask alone needs no lower bound on the keys.
    LOW: tl.constexpr = WINDOW or DOCUMENTS > 0
    # If the scale is positive in float32 too, the maximum can be taken before scaling, and exp(score) takes one multiply-add.
    DIRECT: tl.constexpr = softcap is None and scale > 1e-30  # pyright: ignore
    factor: tl.constexpr = scale * shared.LOG2_E if DIRECT else 1.0  # pyright: ignore
    BLOCK_M: tl.constexpr = 64 * GROUPS
    first, row, batch, head, kv_head = place_of(gl.program_id(0), sizes, BLOCK_M, CAUSAL)
    mask = mask_at(batch, sizes, masks, LENGTHS)
    tiles = query_tiles(first, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N)
    queries = first + GROUP * 64 + gl.arange(0, 64, ROWS)
    low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
    num_tiles = num_tiles_of(tiles, BLOCK_N)
    first_full = gl.maximum(tiles[4], 1)

    q = q_tiles.index(GROUP)
    acc = gl.zeros([64, BLOCK_K], gl.float32, O_LAYOUT)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    if SINKS:
        # A sink acts as a key that every query sees, with this score and a value of 0.
        row_max = gl.full([64], 0.0, gl.float32, ROWS) + gl.load(pointers[5] + head).to(gl.float32) * shared.LOG2_E
        row_sum = gl.full([64], 1.0, gl.float32, ROWS)
    else:
        row_max = gl.full([64], -float("inf"), gl.float32, ROWS)
        row_sum = gl.zeros([64], gl.float32, ROWS)

    mbarrier.wait(q_ready, 0)
    for i in range(first_full - 1):
        p, row_max, row_sum, rescale = masked_softmax(
            i, q, k_tiles, k_ready, k_free, row_max, row_sum, zeros, tile_at(i, tiles, BLOCK_N), low, high,
            factor, scale, softcap, DIRECT, LOW, STAGES, S_LAYOUT,
        )  # fmt: skip
        acc = acc * gl.convert_layout(rescale, O_ROWS)[:, None]
        p = gl.convert_layout(p.to(v_tiles.dtype), P_LAYOUT)
        stage, phase = stage_of(i, STAGES)
        mbarrier.wait(v_ready.index(stage), phase)
        acc = warpgroup_mma_wait(0, (warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True),))
        mbarrier.arrive(v_free.index(stage))
    # The last masked tile, or the first tile if none is masked, fills the pipeline of the loop over unmasked tiles.
    i = first_full - 1
    p, row_max, row_sum, rescale = masked_softmax(
        i, q, k_tiles, k_ready, k_free, row_max, row_sum, zeros, tile_at(i, tiles, BLOCK_N), low, high,
        factor, scale, softcap, DIRECT, LOW, STAGES, S_LAYOUT,
    )  # fmt: skip
    acc = acc * gl.convert_layout(rescale, O_ROWS)[:, None]
    p = gl.convert_layout(p.to(v_tiles.dtype), P_LAYOUT)
    for i in range(first_full, num_tiles):
        stage, phase = stage_of(i, STAGES)
        stage_before, phase_before = stage_of(i - 1, STAGES)
        mbarrier.wait(k_ready.index(stage), phase)
        scores = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(stage_before), phase_before)
        sums = warpgroup_mma(p, v_tiles.index(stage_before), acc, is_async=True)
        s = warpgroup_mma_wait(1, (scores,))
        mbarrier.arrive(k_free.index(stage))
        if not DIRECT:
            s = scores_in_bits(s, scale, softcap)
        next_p, row_max, row_sum, rescale = softmax(s, row_max, row_sum, factor, False)
        acc, p = warpgroup_mma_wait(0, (sums, p))
        mbarrier.arrive(v_free.index(stage_before))
        acc = acc * gl.convert_layout(rescale, O_ROWS)[:, None]
        p = gl.convert_layout(next_p.to(v_tiles.dtype), P_LAYOUT)
    stage, phase = stage_of(num_tiles - 1, STAGES)
    mbarrier.wait(v_ready.index(stage), phase)
    acc = warpgroup_mma_wait(0, (warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True),))

    again = has_nan(acc)
    zero = later_zero(again)
    sizes, strides = opaque(sizes, zero), opaque(strides, zero)
    first, row, batch, head, kv_head = place_of(gl.program_id(0) | zero, sizes, BLOCK_M, CAUSAL)
    start = first + GROUP * 64
    queries = start + gl.arange(0, 64, ROWS)
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr = pointers
    num_queries = sizes[3]
    lse_row = lse_ptr + gl.cast(row, gl.int64) * num_queries
    gl.store(lse_row + queries, (row_max + gl.log2(row_sum)) * shared.LN_2, mask=queries < num_queries)
    if again > 0:
        bases, token_strides = bases_of(pointers, strides, batch, head, kv_head)
        store_isolated_output(
            bases, token_strides, lse_row, start, gl.minimum(start + 64, num_queries), mask_at(batch, sizes, masks, LENGTHS),
            scale, softcap, CAUSAL, WINDOW, DOCUMENTS, HEAD_DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip
    else:
        # A row that sees no key has a sum of 0, an output of 0 and an lse of -inf.
        inverse = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
        # Only this group reads its part of q, so the output can reuse that buffer.
        q.store((acc * gl.convert_layout(inverse, O_ROWS)[:, None]).to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, start, 0], q)
        tma.store_wait(0)


@gluon.jit
def produce(
    buffers, barriers, q_desc, k_desc, v_desc, masks, sizes,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, LENGTHS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Load the queries, then prefetch the keys and values tile by tile, STAGES tiles ahead."""
    first, row, batch, head, kv_head = place_of(gl.program_id(0), sizes, 64 * GROUPS, CAUSAL)
    tiles = query_tiles(first, mask_at(batch, sizes, masks, LENGTHS), CAUSAL, WINDOW, DOCUMENTS, 64 * GROUPS, BLOCK_N)
    q_tiles, k_tiles, v_tiles = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    mbarrier.expect(q_ready, GROUPS * q_desc.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_desc, [batch, head, first + group * 64, 0], q_ready, q_tiles.index(group))
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
def attention_forward_hopper(
    q, k, v, o, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride, document_stride,
    num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, PRECISION: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of one head, 64 queries a warp group. The descriptors of q and o cover 64 rows."""
    BLOCK_K: tl.constexpr = q.block_type.shape[3]
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], q.dtype)
    BARRIER: tl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, BLOCK_K], TILE)
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

    buffers = (q_tiles, k_tiles, v_tiles)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    # Each partition derives its values from the arguments, so that they occupy no registers before.
    pointers = (q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr)
    masks = (begins_ptr, ends_ptr, lengths_ptr)
    strides = (
        q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
        v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride,
    )  # fmt: skip
    sizes = (num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once, document_stride)
    # Spelled out for each group, because constexpr arguments stay constant only if they are literal in the call.
    if GROUPS == 3:
        gl.warp_specialize([
            (consume, (buffers, barriers, o, pointers, masks, strides, sizes, 0, scale, softcap, CAUSAL, WINDOW, DOCUMENTS,
                       LENGTHS, SINKS, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (consume, (buffers, barriers, o, pointers, masks, strides, sizes, 1, scale, softcap, CAUSAL, WINDOW, DOCUMENTS,
                       LENGTHS, SINKS, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (consume, (buffers, barriers, o, pointers, masks, strides, sizes, 2, scale, softcap, CAUSAL, WINDOW, DOCUMENTS,
                       LENGTHS, SINKS, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (produce, (buffers, barriers, q, k, v, masks, sizes, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, GROUPS, BLOCK_N, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (buffers, barriers, o, pointers, masks, strides, sizes, 0, scale, softcap, CAUSAL, WINDOW, DOCUMENTS,
                       LENGTHS, SINKS, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (consume, (buffers, barriers, o, pointers, masks, strides, sizes, 1, scale, softcap, CAUSAL, WINDOW, DOCUMENTS,
                       LENGTHS, SINKS, HEAD_DIM, VALUE_DIM, GROUPS, BLOCK_N, STAGES)),
            (produce, (buffers, barriers, q, k, v, masks, sizes, CAUSAL, WINDOW, DOCUMENTS, LENGTHS, GROUPS, BLOCK_N, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip
