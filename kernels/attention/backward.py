"""The backward pass: one kernel for dQ and one for dK and dV (Dao 2023, algorithm 2).

Both kernels recompute the probabilities from lse. Each sums in a fixed order without atomic additions, so equal inputs give
equal bits. The cost is two extra products: the scores and dP are computed in both kernels.
"""

from .. import shared
from ..dispatch import jit, tl
from .intervals import key_tiles, keys_of, mask_of, queries_of, query_tiles
from .isolated import has_nan, later_zero, store_isolated_dk_dv, store_isolated_dq
from .scores import ds_of, load_lse, probabilities_of, sees
from .tiles import SIZES, head_and_place, load_base, load_tile, program_of, store_base, store_tile


@jit(do_not_specialize=SIZES)
def attention_backward_q(
    q, k, v, do, q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
    o_batch_stride, o_head_stride, o_token_stride, dq_batch_stride, dq_head_stride, dq_token_stride, document_stride,
    num_rows, num_heads, group_size, num_queries, num_keys, window_left, window_right, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of queries of one head, and delta for the dK/dV kernel."""
    tile, row = program_of(tl.program_id(0), tl.cdiv(num_queries, BLOCK_M), num_rows, rows_at_once, CAUSAL)
    batch = row // num_heads
    head = row % num_heads
    kv_head = head // group_size
    start = tile * BLOCK_M
    mask = mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )
    queries = start + tl.arange(0, BLOCK_M)
    tiles = query_tiles(start, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N)
    left_start, left, full_start, full_end, masked = tiles

    q_base = load_base(q, batch, head, q_batch_stride, q_head_stride, TMA)
    k_base = load_base(k, batch, kv_head, k_batch_stride, k_head_stride, TMA)
    v_base = load_base(v, batch, kv_head, v_batch_stride, v_head_stride, TMA)
    do_base = load_base(do, batch, head, do_batch_stride, do_head_stride, TMA)
    o_base = load_base(o_ptr, batch, head, o_batch_stride, o_head_stride, False)
    q_tile = load_tile(q_base, batch, head, start, num_queries, q_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K, TMA, True)
    do_tile = load_tile(do_base, batch, head, start, num_queries, do_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, True)
    o_tile = load_tile(o_base, batch, head, start, num_queries, o_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V, False, True)

    statistics = tl.cast(row, tl.int64) * num_queries
    # delta_i = sum_j P_ij dP_ij = do_i o_i (Dao 2023, section 3.1). A gradient dlse_i adds P_ij dlse_i to each dS_ij.
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + statistics + queries, mask=queries < num_queries, other=0.0)
    lse = load_lse(lse_ptr + statistics, queries, num_queries)
    # A query without keys has an lse of -inf; its gradient reaches no input.
    delta = tl.where(lse == float("inf"), 0.0, delta)
    tl.store(delta_ptr + statistics + queries, delta, mask=queries < num_queries)

    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(full_start, full_end, BLOCK_N):
        k_tile = load_tile(k_base, batch, kv_head, n, num_keys, k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, False)
        v_tile = load_tile(v_base, batch, kv_head, n, num_keys, v_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V, TMA, False)
        ds = ds_of(q_tile, k_tile, v_tile, do_tile, lse, delta, n, None, None, scale, softcap, PRECISION, False)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    # Computed after the first loop to keep the bounds out of its registers.
    low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
    for i in range(masked):
        n = tl.where(i < left, left_start + i * BLOCK_N, full_end + (i - left) * BLOCK_N)
        k_tile = load_tile(k_base, batch, kv_head, n, mask[1], k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, True)
        v_tile = load_tile(v_base, batch, kv_head, n, mask[1], v_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V, TMA, True)
        ds = ds_of(q_tile, k_tile, v_tile, do_tile, lse, delta, n, low, high, scale, softcap, PRECISION, True)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)

    again = has_nan(dq)
    zero = later_zero(again)
    tile, row = program_of(tl.program_id(0) | zero, tl.cdiv(num_queries | zero, BLOCK_M), num_rows, rows_at_once, CAUSAL)
    batch = row // num_heads
    head = row % num_heads
    start = tile * BLOCK_M
    dq_base = store_base(dq_ptr, batch, head, dq_batch_stride, dq_head_stride)
    store_tile(dq_base, dq * scale, start, num_queries, dq_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K)
    if again > 0:
        kv_head = head // group_size
        statistics = tl.cast(row, tl.int64) * num_queries
        mask = mask_of(
            batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
        )
        store_isolated_dq(
            load_base(q_ptr, batch, head, q_batch_stride, q_head_stride, False),
            load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False),
            load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False),
            load_base(do_ptr, batch, head, do_batch_stride, do_head_stride, False),
            dq_base, lse_ptr + statistics, delta_ptr + statistics,
            q_token_stride, k_token_stride, v_token_stride, do_token_stride, dq_token_stride,
            start, start + BLOCK_M, mask, again,
            scale, softcap, CAUSAL, WINDOW, DOCUMENTS, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip


@jit
def add_to_dk_dv(
    q, k, v, do, dk, dv, lse_ptr, delta_ptr, start, low, high, num_queries,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the queries (M, K) from `start` on to dk and dv (N, K). The caller scales dk."""
    queries = start + tl.arange(0, q.shape[0])
    # Scores are transposed, (N, M), so that they multiply do and q directly from registers.
    products = tl.dot(k, q.T, input_precision=PRECISION)
    if MASKED:
        lse = load_lse(lse_ptr, queries, num_queries)
    else:
        lse = tl.load(lse_ptr + queries) * shared.LOG2_E
    p, slope = probabilities_of(products, lse[None, :], scale, softcap)
    if MASKED:
        p = tl.where(sees(start, low, high, q.shape[0]), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, do.T, input_precision=PRECISION)
    if MASKED:
        delta = tl.load(delta_ptr + queries, mask=queries < num_queries, other=0.0)
    else:
        delta = tl.load(delta_ptr + queries)
    ds = p * (dp - delta[None, :]) * slope
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@jit(do_not_specialize=SIZES)
def attention_backward_kv(
    q, k, v, do, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, begins_ptr, ends_ptr, lengths_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride, dv_batch_stride, dv_head_stride, dv_token_stride, document_stride,
    num_rows, num_kv_heads, num_parts, dk_part_stride, dv_part_stride, group_size,
    num_queries, num_keys, window_left, window_right, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    LENGTHS: tl.constexpr, GROUPED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys of one key-value head, summed over one part (`group_size` heads) of its group."""
    tile, row = program_of(tl.program_id(0), tl.cdiv(num_keys, BLOCK_N), num_rows, rows_at_once, False)
    part = row % num_parts
    kv_head = row // num_parts % num_kv_heads
    batch = row // num_parts // num_kv_heads
    first_head = (kv_head * num_parts + part) * group_size
    num_heads = num_kv_heads * num_parts * group_size
    start = tile * BLOCK_N
    mask = mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )
    tiles = key_tiles(start, mask, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N)
    left_start, left, full_start, full_end, masked = tiles
    if LENGTHS:
        # No query sees a key beyond the sequence's length.
        full_end = tl.where(start < mask[1], full_end, full_start)
        masked = tl.where(start < mask[1], masked, 0)

    k_base = load_base(k, batch, kv_head, k_batch_stride, k_head_stride, TMA)
    v_base = load_base(v, batch, kv_head, v_batch_stride, v_head_stride, TMA)
    k_tile = load_tile(k_base, batch, kv_head, start, num_keys, k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, True)
    v_tile = load_tile(v_base, batch, kv_head, start, num_keys, v_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V, TMA, True)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    # One loop over the tiles of all query heads, so that prefetching continues across heads.
    full = (full_end - full_start) // BLOCK_M
    for i in range(full * group_size):
        head, place = head_and_place(i, full, first_head, GROUPED)
        m = full_start + place * BLOCK_M
        q_base = load_base(q, batch, head, q_batch_stride, q_head_stride, TMA)
        do_base = load_base(do, batch, head, do_batch_stride, do_head_stride, TMA)
        q_tile = load_tile(q_base, batch, head, m, num_queries, q_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K, TMA, False)
        do_tile = load_tile(do_base, batch, head, m, num_queries, do_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, False)
        statistics = tl.cast(batch * num_heads + head, tl.int64) * num_queries
        dk, dv = add_to_dk_dv(
            q_tile, k_tile, v_tile, do_tile, dk, dv, lse_ptr + statistics, delta_ptr + statistics, m, None, None, num_queries,
            scale, softcap, PRECISION, False,
        )  # fmt: skip
    # Computed after the first loop to keep the bounds out of its registers.
    low, high = queries_of(start + tl.arange(0, BLOCK_N), mask, CAUSAL, WINDOW, DOCUMENTS)
    for i in range(masked * group_size):
        head, place = head_and_place(i, masked, first_head, GROUPED)
        m = tl.where(place < left, left_start + place * BLOCK_M, full_end + (place - left) * BLOCK_M)
        q_base = load_base(q, batch, head, q_batch_stride, q_head_stride, TMA)
        do_base = load_base(do, batch, head, do_batch_stride, do_head_stride, TMA)
        q_tile = load_tile(q_base, batch, head, m, num_queries, q_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K, TMA, True)
        do_tile = load_tile(do_base, batch, head, m, num_queries, do_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V, TMA, True)
        statistics = tl.cast(batch * num_heads + head, tl.int64) * num_queries
        dk, dv = add_to_dk_dv(
            q_tile, k_tile, v_tile, do_tile, dk, dv, lse_ptr + statistics, delta_ptr + statistics, m, low, high, num_queries,
            scale, softcap, PRECISION, True,
        )  # fmt: skip
    again = tl.maximum(has_nan(dk), has_nan(dv))
    zero = later_zero(again)
    tile, row = program_of(tl.program_id(0) | zero, tl.cdiv(num_keys | zero, BLOCK_N), num_rows, rows_at_once, False)
    part = row % num_parts
    kv_head = row // num_parts % num_kv_heads
    batch = row // num_parts // num_kv_heads
    start = tile * BLOCK_N
    mask = mask_of(
        batch, num_queries, num_keys, window_left, window_right, begins_ptr, ends_ptr, document_stride, lengths_ptr, LENGTHS
    )
    if LENGTHS:
        # No query sees a key beyond the length, but a tile's bounds come only from its first and last key.
        present = start + tl.arange(0, BLOCK_N) < mask[1]
        dk = tl.where(present[:, None], dk, 0.0)
        dv = tl.where(present[:, None], dv, 0.0)

    dk_part = dk_ptr + tl.cast(part, tl.int64) * dk_part_stride
    dv_part = dv_ptr + tl.cast(part, tl.int64) * dv_part_stride
    dk_base = store_base(dk_part, batch, kv_head, dk_batch_stride, dk_head_stride)
    dv_base = store_base(dv_part, batch, kv_head, dv_batch_stride, dv_head_stride)
    store_tile(dk_base, dk * scale, start, num_keys, dk_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K)
    store_tile(dv_base, dv, start, num_keys, dv_token_stride, VALUE_DIM, BLOCK_N, BLOCK_V)
    if again > 0:
        first_head = (kv_head * num_parts + part) * group_size
        num_heads = num_kv_heads * num_parts * group_size
        first_row = tl.cast(batch * num_heads + first_head, tl.int64) * num_queries
        store_isolated_dk_dv(
            load_base(q_ptr, batch, first_head, q_batch_stride, q_head_stride, False),
            load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False),
            load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False),
            load_base(do_ptr, batch, first_head, do_batch_stride, do_head_stride, False),
            dk_base, dv_base, lse_ptr + first_row, delta_ptr + first_row,
            q_head_stride, q_token_stride, k_token_stride, v_token_stride, do_head_stride, do_token_stride,
            dk_token_stride, dv_token_stride, group_size, start, start + BLOCK_N, num_keys, mask, again,
            scale, softcap, CAUSAL, WINDOW, DOCUMENTS, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
        )  # fmt: skip
