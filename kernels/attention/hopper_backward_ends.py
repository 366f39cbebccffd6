"""Kernels that run before and after `hopper_backward`: compute delta, write dq from the sums, and recompute tiles with NaN."""

from ..dispatch import jit, tl
from .isolated import has_nan, later_zero, store_isolated_dk_dv, store_isolated_dq
from .tiles import SIZES, load_base, load_tile, store_base, store_tile


@jit(do_not_specialize=(*SIZES, "num_tokens"))
def attention_backward_delta(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr,
    o_batch_stride, o_head_stride, o_token_stride, do_batch_stride, do_head_stride, do_token_stride, num_heads, num_tokens,
    DLSE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write delta of a tile of queries: do_i o_i = sum_j P_ij dP_ij (Dao 2023, section 3.1), minus the gradient of lse_i."""
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    row = tl.program_id(0) // num_tiles
    start = tl.program_id(0) % num_tiles * BLOCK_M
    batch, head = row // num_heads, row % num_heads
    o_base = load_base(o_ptr, batch, head, o_batch_stride, o_head_stride, False)
    do_base = load_base(do_ptr, batch, head, do_batch_stride, do_head_stride, False)
    o = load_tile(o_base, batch, head, start, num_tokens, o_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V, False, True)
    do = load_tile(do_base, batch, head, start, num_tokens, do_token_stride, VALUE_DIM, BLOCK_M, BLOCK_V, False, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    queries = start + tl.arange(0, BLOCK_M)
    offsets = tl.cast(row, tl.int64) * num_tokens + queries
    if DLSE:
        delta -= tl.load(dlse_ptr + offsets, mask=queries < num_tokens, other=0.0)
    tl.store(delta_ptr + offsets, delta, mask=queries < num_tokens)


@jit(do_not_specialize=(*SIZES, "num_tokens"))
def attention_backward_dq(
    sums_ptr, q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
    dq_batch_stride, dq_head_stride, dq_token_stride, num_heads, group_size, num_tokens,
    scale: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dq of a tile of queries from its sums, whose layout `hopper_turns.sum_offsets` defines."""
    num_tiles = tl.cdiv(num_tokens, BLOCK_M)
    row = tl.program_id(0) // num_tiles
    start = tl.program_id(0) % num_tiles * BLOCK_M
    batch, head = row // num_heads, row % num_heads
    places = tl.cast(tl.program_id(0), tl.int64) * (BLOCK_M * BLOCK_K) + tl.arange(0, BLOCK_M * BLOCK_K)
    # Axes: channels // 64, queries // 8, channels % 16 // 8, channels % 64 // 16, channels % 8, queries % 8.
    sums = tl.load(sums_ptr + places).reshape(BLOCK_K // 64, BLOCK_M // 8, 2, 4, 8, 8)
    dq = sums.permute(1, 5, 0, 3, 2, 4).reshape(BLOCK_M, BLOCK_K)
    again = has_nan(dq)
    zero = later_zero(again)
    dq_base = store_base(dq_ptr, batch, head | zero, dq_batch_stride, dq_head_stride)
    store_tile(dq_base, dq * scale, start, num_tokens, dq_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K)
    if again > 0:
        kv_head = head // group_size
        statistics = tl.cast(row, tl.int64) * num_tokens
        store_isolated_dq(
            load_base(q_ptr, batch, head, q_batch_stride, q_head_stride, False),
            load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False),
            load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False),
            load_base(do_ptr, batch, head, do_batch_stride, do_head_stride, False),
            dq_base, lse_ptr + statistics, delta_ptr + statistics,
            q_token_stride, k_token_stride, v_token_stride, do_token_stride, dq_token_stride,
            start, start + BLOCK_M, (num_tokens, num_tokens, 0, 0, lse_ptr, lse_ptr), again,
            scale, None, True, False, 0, "ieee", HEAD_DIM, VALUE_DIM, BLOCK_K,
        )  # fmt: skip


@jit(do_not_specialize=(*SIZES, "num_tokens"))
def attention_backward_again(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, do_batch_stride, do_head_stride, do_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride, dv_batch_stride, dv_head_stride, dv_token_stride,
    num_kv_heads, group_size, num_tokens,
    scale: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Recompute dk and dv of a tile of keys if they hold a NaN, using only visible pairs (see `isolated`)."""
    num_tiles = tl.cdiv(num_tokens, BLOCK_N)
    row = tl.program_id(0) // num_tiles
    start = tl.program_id(0) % num_tiles * BLOCK_N
    batch, kv_head = row // num_kv_heads, row % num_kv_heads
    dk_base = store_base(dk_ptr, batch, kv_head, dk_batch_stride, dk_head_stride)
    dv_base = store_base(dv_ptr, batch, kv_head, dv_batch_stride, dv_head_stride)
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    inside = rows < num_tokens - start
    dk_place = dk_base + (start + rows).to(tl.int64) * dk_token_stride + columns
    dv_place = dv_base + (start + rows).to(tl.int64) * dv_token_stride + columns
    dk = tl.load(dk_place, mask=inside & (columns < HEAD_DIM), other=0.0).to(tl.float32)
    dv = tl.load(dv_place, mask=inside & (columns < VALUE_DIM), other=0.0).to(tl.float32)
    again = tl.maximum(has_nan(dk), has_nan(dv))
    if again > 0:
        first_head = kv_head * group_size
        first_row = tl.cast(row, tl.int64) * group_size * num_tokens
        store_isolated_dk_dv(
            load_base(q_ptr, batch, first_head, q_batch_stride, q_head_stride, False),
            load_base(k_ptr, batch, kv_head, k_batch_stride, k_head_stride, False),
            load_base(v_ptr, batch, kv_head, v_batch_stride, v_head_stride, False),
            load_base(do_ptr, batch, first_head, do_batch_stride, do_head_stride, False),
            dk_base, dv_base, lse_ptr + first_row, delta_ptr + first_row,
            q_head_stride, q_token_stride, k_token_stride, v_token_stride, do_head_stride, do_token_stride,
            dk_token_stride, dv_token_stride, group_size, start, start + BLOCK_N, num_tokens,
            (num_tokens, num_tokens, 0, 0, lse_ptr, lse_ptr), again,
            scale, None, True, False, 0, "ieee", HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_K,
        )  # fmt: skip
