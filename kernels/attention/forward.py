"""The forward pass: FlashAttention-2's loop over tiles of keys with an online softmax (Dao 2023, algorithm 1)."""

from .. import shared
from ..dispatch import jit, tl
from .intervals import keys_of, mask_of, query_tiles
from .isolated import has_nan, later_zero, store_isolated_output
from .scores import scores_in_bits, sees
from .tiles import SIZES, load_base, load_tile, program_of, store_base, store_tile


@jit
def scores_of(q, k, scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr):
    """Return scores (M, N) and a factor; their product is the scores in bits (units of log2(e))."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    # If the scale is positive in float32 too, the maximum can be taken before scaling, and exp(score) takes one multiply-add.
    DIRECT: tl.constexpr = tl.constexpr(softcap is None and scale > 1e-30)
    factor: tl.constexpr = tl.constexpr(scale * shared.LOG2_E if DIRECT else 1.0)
    if not DIRECT:
        scores = scores_in_bits(scores, scale, softcap)
    return scores, factor


@jit
def add_tile(
    q, k, v, accumulator, row_sum, row_max, start, low, high,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the output (M, V) and each query's sum and maximum score (M) with the keys and values from `start` on."""
    scores, factor = scores_of(q, k, scale, softcap, PRECISION)
    if MASKED:
        scores = tl.where(sees(start, low, high, k.shape[0]), scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    if MASKED:
        # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
        reference = tl.where(new_max == -float("inf"), 0.0, new_max)
    else:
        reference = new_max
    probabilities = tl.exp2(scores * factor - reference[:, None])
    rescale = tl.exp2(row_max - reference)
    row_sum = row_sum * rescale + tl.sum(probabilities, 1)
    accumulator = tl.dot(probabilities.to(v.dtype), v, accumulator * rescale[:, None], input_precision=PRECISION)
    return accumulator, row_sum, new_max


@jit(do_not_specialize=SIZES)
def attention_forward(
    q, k, v, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, sinks_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride, document_stride,
    num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of queries of one head."""
    tile, row = program_of(tl.program_id(0), tl.cdiv(num_queries, BLOCK_M), num_rows, rows_at_once, CAUSAL)
    batch = row // num_heads
    head = row % num_heads
    kv_head = head // group_size
    start = tile * BLOCK_M
    mask = mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )
    tiles = query_tiles(start, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N)
    left_start, left, full_start, full_end, masked = tiles

    q_base = load_base(q, batch, head, q_batch_stride, q_head_stride, TMA)
    k_base = load_base(k, batch, kv_head, k_batch_stride, k_head_stride, TMA)
    v_base = load_base(v, batch, kv_head, v_batch_stride, v_head_stride, TMA)
    q_tile = load_tile(q_base, batch, head, start, num_queries, q_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K, TMA, True)

    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if SINKS:
        # A sink acts as a key that every query sees, with this score and a value of 0.
        row_max = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * shared.LOG2_E
        row_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)

    for n in range(full_start, full_end, BLOCK_N):
        k_tile = load_tile(k_base, batch, kv_head, n, num_keys, k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, False)
        v_tile = load_tile(v_base, batch, kv_head, n, num_keys, v_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V, TMA, False)
        accumulator, row_sum, row_max = add_tile(
            q_tile, k_tile, v_tile, accumulator, row_sum, row_max, n, None, None, scale, softcap, PRECISION, False
        )
    # Computed after the first loop to keep the bounds out of its registers.
    low, high = keys_of(start + tl.arange(0, BLOCK_M), mask, CAUSAL, WINDOW, DOCUMENTS)
    for i in range(masked):
        n = tl.where(i < left, left_start + i * BLOCK_N, full_end + (i - left) * BLOCK_N)
        k_tile = load_tile(k_base, batch, kv_head, n, mask[1], k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, True)
        v_tile = load_tile(v_base, batch, kv_head, n, mask[1], v_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V, TMA, True)
        accumulator, row_sum, row_max = add_tile(
            q_tile, k_tile, v_tile, accumulator, row_sum, row_max, n, low, high, scale, softcap, PRECISION, True
        )

    again = has_nan(accumulator)
    zero = later_zero(again)
    tile, row = program_of(tl.program_id(0) | zero, tl.cdiv(num_queries | zero, BLOCK_M), num_rows, rows_at_once, CAUSAL)
    batch = row // num_heads
    head = row % num_heads
    start = tile * BLOCK_M
    queries = start + tl.arange(0, BLOCK_M)
    lse_row = lse_ptr + tl.cast(row, tl.int64) * num_queries
    # A row that sees no key has a sum of 0, an output of 0 and an lse of -inf.
    accumulator = accumulator * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    o_base = store_base(o_ptr, batch, head, o_batch_stride, o_head_stride)
    store_tile(o_base, accumulator, start, num_queries, o_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V)
    tl.store(lse_row + queries, (row_max + tl.log2(row_sum)) * shared.LN_2, mask=queries < num_queries)
    if again > 0:
        kv_head = head // group_size
        mask = mask_of(
            batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
        )
        store_isolated_output(
            load_base(q_ptr, batch, head, q_batch_stride, q_head_stride, False),
            load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False),
            load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False),
            o_base, lse_row,
            q_token_stride, k_token_stride, v_token_stride, o_token_stride, start, start + BLOCK_M, mask, again,
            scale, softcap, CAUSAL, WINDOW, DOCUMENTS, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
