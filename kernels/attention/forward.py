"""The forward pass: FlashAttention-2's loop over tiles of keys with an online softmax (Dao 2023, algorithm 1)."""

from torch import Tensor

from ..dispatch import jit, tl
from ..launch import launch
from ..shared import LN_2, LOG2_E, tanh
from .configurations import launch_config, rows_at_once
from .intervals import query_tile
from .options import Options
from .tiles import (
    SIZES,
    aligned,
    as_tiles,
    load_base,
    load_strides,
    load_tile,
    program_of,
    store_base,
    store_tile,
)


@jit
def scores_in_bits(scores, scale: tl.constexpr, softcap: tl.constexpr):
    """Return scaled and soft-capped scores in units of log2(e): their exponential is exp2, which the hardware has."""
    if softcap is None:
        scores = scores * (scale * LOG2_E)
    else:
        scores = tanh(scores * (scale / softcap)) * (softcap * LOG2_E)
    return scores


@jit
def add_tile(
    q, k, v, accumulator, total, top, start, low, high,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys and values from `start` on into the output (M, K), the sum and the greatest score (M) of each query."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    # With a scale above 0, in float32 too, the greatest product has the greatest score, and exp(score) takes one multiply-add.
    DIRECT: tl.constexpr = tl.constexpr(softcap is None and scale > 1e-30)
    factor: tl.constexpr = tl.constexpr(scale * LOG2_E if DIRECT else 1.0)
    if not DIRECT:
        scores = scores_in_bits(scores, scale, softcap)
    if MASKED:
        keys = start + tl.arange(0, k.shape[0])[None, :]
        scores = tl.where((keys >= low[:, None]) & (keys < high[:, None]), scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    if MASKED:
        # Where a row has seen no key yet, -inf - -inf would be NaN.
        reference = tl.where(new_top == -float("inf"), 0.0, new_top)
    else:
        reference = new_top
    probabilities = tl.exp2(scores * factor - reference[:, None])
    rescale = tl.exp2(top - reference)
    total = total * rescale + tl.sum(probabilities, 1)
    accumulator = tl.dot(probabilities.to(v.dtype), v, accumulator * rescale[:, None], input_precision=PRECISION)
    return accumulator, total, new_top


@jit(do_not_specialize=SIZES)
def attention_forward(
    q, k, v, o_ptr, lse_ptr, sinks_ptr, begins_ptr, ends_ptr,
    q_batch_stride, q_head_stride, q_token_stride, k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride, o_batch_stride, o_head_stride, o_token_stride, document_stride,
    num_rows, num_heads, group_size, num_queries, num_keys, window, rows_at_once,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write o and lse of one tile of queries of one head."""
    tile, row = program_of(tl.program_id(0), tl.cdiv(num_queries, BLOCK_M), num_rows, rows_at_once, CAUSAL)
    batch = row // num_heads
    head = row % num_heads
    kv_head = head // group_size
    start = tile * BLOCK_M
    begins_ptr += tl.cast(batch, tl.int64) * document_stride
    ends_ptr += tl.cast(batch, tl.int64) * document_stride

    queries, low, high, tiles = query_tile(
        start, num_queries, num_keys, window, begins_ptr, ends_ptr, CAUSAL, WINDOW, DOCUMENTS, BLOCK_M, BLOCK_N
    )
    left_start, left, full_start, full_end, masked = tiles

    q_base = load_base(q, batch, head, q_batch_stride, q_head_stride, TMA)
    k_base = load_base(k, batch, kv_head, k_batch_stride, k_head_stride, TMA)
    v_base = load_base(v, batch, kv_head, v_batch_stride, v_head_stride, TMA)
    q_tile = load_tile(q_base, batch, head, start, num_queries, q_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K, TMA, True)

    accumulator = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if SINKS:
        # A sink is a key that every query sees, with this score and a value of 0.
        top = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)

    for n in range(full_start, full_end, BLOCK_N):
        k_tile = load_tile(k_base, batch, kv_head, n, num_keys, k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, False)
        v_tile = load_tile(v_base, batch, kv_head, n, num_keys, v_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, False)
        accumulator, total, top = add_tile(
            q_tile, k_tile, v_tile, accumulator, total, top, n, low, high, scale, softcap, PRECISION, False
        )
    for i in range(masked):
        n = tl.where(i < left, left_start + i * BLOCK_N, full_end + (i - left) * BLOCK_N)
        k_tile = load_tile(k_base, batch, kv_head, n, num_keys, k_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, True)
        v_tile = load_tile(v_base, batch, kv_head, n, num_keys, v_token_stride, HEAD_DIM, BLOCK_N, BLOCK_K, TMA, True)
        accumulator, total, top = add_tile(
            q_tile, k_tile, v_tile, accumulator, total, top, n, low, high, scale, softcap, PRECISION, True
        )

    # A row that saw no key has a total of 0: its output is 0 and its lse -inf.
    accumulator = accumulator * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    o_base = store_base(o_ptr, batch, head, o_batch_stride, o_head_stride)
    store_tile(o_base, accumulator, start, num_queries, o_token_stride, HEAD_DIM, BLOCK_M, BLOCK_K)
    lse = (top + tl.log2(total)) * LN_2
    tl.store(lse_ptr + tl.cast(row, tl.int64) * num_queries + queries, lse, mask=queries < num_queries)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None, options: Options) -> None:
    """Fill o (B, H, T, K), its head dim contiguous, and lse (B, H, T) float32, contiguous."""
    batch, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    q, k, v = (aligned(t) for t in (q, k, v))
    config = launch_config("forward", (q, k, v), options)
    launch(
        attention_forward, batch * num_heads * -(-num_queries // config.block_m),
        *as_tiles((q, k, v), "mnn", config), o, lse, q if sinks is None else sinks, *options.documents(q),
        *load_strides(q), *load_strides(k), *load_strides(v), *o.stride()[:3], options.document_stride,
        batch * num_heads, num_heads, num_heads // num_kv_heads, num_queries, num_keys,
        options.window_of(num_queries, num_keys), rows_at_once(k, num_kv_heads / num_heads, batch * num_heads),
        **options.constants(), SINKS=sinks is not None, HEAD_DIM=head_dim, TMA=config.tma, **config.blocks(),
    )  # fmt: skip
