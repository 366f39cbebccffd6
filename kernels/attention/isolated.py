"""What a mask excludes reaches no result: how a tile is computed again whose result holds a NaN.

The kernels give an excluded pair the probability 0. In a product of matrices that is not enough, because 0 times a value that
is not finite is NaN: a later token would reach the queries before it that share its tile. So a program whose result holds a
NaN computes it again, from the lse that it has written. Here a row that is not finite is 0 in the product, and the probability
of those who see it NaN. It comes last in a program, and takes few rows at a time, so that it needs fewer registers than
what comes before it.
"""

from typing import Any

from ..dispatch import HAS_TRITON, jit, tl
from .intervals import key_tile, query_tile
from .scores import ds_of, load_lse, probabilities_of, sees
from .tiles import load_tile, store_tile, stride_unit

# Queries, and keys, that are taken at a time: the least that a matrix instruction takes.
ROWS: Any = tl.constexpr(16) if HAS_TRITON else None


@jit
def has_nan(x):
    """Return whether a tile (M, N) holds a NaN."""
    return tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0


@jit
def split_finite(x):
    """Return a tile (N, K) with 0 in the place of what is not finite, and which of its rows (N) had such elements.

    0 times a value that is not finite is NaN, so that in a product the rows that a mask excludes would reach every result.
    """
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0), tl.min(finite.to(tl.int32), 1) == 0


@jit
def isolated_output(
    q, lse, low, high, k_base, v_base, k_token_stride, v_token_stride, start, stop, end,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return the output (ROWS, V) of queries with these lse in bits, from the keys start to stop, of which there are `end`."""
    o = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for n in tl.range(start, stop, ROWS, num_stages=1):
        k = load_tile(k_base, 0, 0, n, end, k_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
        v = load_tile(v_base, 0, 0, n, end, v_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True)
        v, bad = split_finite(v)
        p, _ = probabilities_of(tl.dot(q, k.T, input_precision=PRECISION), lse[:, None], scale, softcap)
        p = tl.where(sees(n, low, high, ROWS), tl.where(bad[None, :], float("nan"), p), 0.0)
        o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION)
    return o


@jit
def store_isolated_output(
    q_base, k_base, v_base, o_base, lse_ptr, q_token_stride, k_token_stride, v_token_stride, o_token_stride,
    first, last, mask,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the output of the queries from `first` to `last` of a head again."""
    # Other threads than these have written lse, and the output before.
    tl.debug_barrier()
    for m in tl.range(first, last, ROWS, num_stages=1):
        # Its own tiles again, lest those of the program occupy registers until here.
        queries, low, high, tiles = query_tile(m, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, ROWS)
        start, left, _, full_end, masked = tiles
        stop = full_end + (masked - left) * ROWS
        q = load_tile(q_base, 0, 0, m, mask[0], q_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
        o = isolated_output(
            q, load_lse(lse_ptr, queries, mask[0]), low, high, k_base, v_base, k_token_stride, v_token_stride,
            start, stop, mask[1], scale, softcap, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        store_tile(o_base, o, m, mask[0], o_token_stride, VALUE_DIM, ROWS, BLOCK_V)


@jit
def store_isolated_dq(
    q_base, k_base, v_base, do_base, dq_base, lse_ptr, delta_ptr,
    q_token_stride, k_token_stride, v_token_stride, do_token_stride, dq_token_stride, first, last, mask,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dq of the queries from `first` to `last` of a head again."""
    # Other threads than these have written delta, and dq before.
    tl.debug_barrier()
    for m in tl.range(first, last, ROWS, num_stages=1):
        # Its own tiles again, lest those of the program occupy registers until here.
        queries, low, high, tiles = query_tile(m, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, ROWS)
        start, left, _, full_end, masked = tiles
        stop = full_end + (masked - left) * ROWS
        q = load_tile(q_base, 0, 0, m, mask[0], q_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
        do = load_tile(do_base, 0, 0, m, mask[0], do_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True)
        lse = load_lse(lse_ptr, queries, mask[0])
        delta = tl.load(delta_ptr + queries, mask=queries < mask[0], other=0.0)
        dq = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for n in tl.range(start, stop, ROWS, num_stages=1):
            k = load_tile(k_base, 0, 0, n, mask[1], k_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
            v = load_tile(v_base, 0, 0, n, mask[1], v_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True)
            ds = ds_of(q, k, v, do, lse, delta, n, low, high, scale, softcap, PRECISION, True)
            k, bad = split_finite(k)
            ds = tl.where(sees(n, low, high, ROWS) & bad[None, :], float("nan"), ds)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_tile(dq_base, dq * scale, m, mask[0], dq_token_stride, HEAD_DIM, ROWS, BLOCK_K)


@jit
def store_isolated_dk_dv(
    q_base, k_base, v_base, do_base, dk_base, dv_base, lse_ptr, delta_ptr,
    q_head_stride, q_token_stride, k_token_stride, v_token_stride, do_head_stride, do_token_stride,
    dk_token_stride, dv_token_stride, group_size, first, last, num_keys, mask,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of the keys from `first` to `last` again, from the queries of `group_size` heads."""
    # Other threads than these have written dk and dv before.
    tl.debug_barrier()
    for n in tl.range(first, last, ROWS, num_stages=1):
        keys, low, high, tiles = key_tile(n, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, ROWS)
        start, left, _, full_end, masked = tiles
        stop = full_end + (masked - left) * ROWS
        high = tl.where(keys < mask[1], high, 0)
        k = load_tile(k_base, 0, 0, n, num_keys, k_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
        v = load_tile(v_base, 0, 0, n, num_keys, v_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True)
        dk = tl.zeros((ROWS, BLOCK_K), tl.float32)
        dv = tl.zeros((ROWS, BLOCK_V), tl.float32)
        for i in tl.range(0, group_size, num_stages=1):
            q_of_head = q_base + tl.cast(i, tl.int64) * q_head_stride * stride_unit(q_base)
            do_of_head = do_base + tl.cast(i, tl.int64) * do_head_stride * stride_unit(do_base)
            statistics = tl.cast(i, tl.int64) * mask[0]
            for m in tl.range(start, stop, ROWS, num_stages=1):
                queries = m + tl.arange(0, ROWS)
                q = load_tile(q_of_head, 0, 0, m, mask[0], q_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
                do = load_tile(do_of_head, 0, 0, m, mask[0], do_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True)
                lse = load_lse(lse_ptr + statistics, queries, mask[0])
                delta = tl.load(delta_ptr + statistics + queries, mask=queries < mask[0], other=0.0)
                p, slope = probabilities_of(tl.dot(k, q.T, input_precision=PRECISION), lse[None, :], scale, softcap)
                ds = p * (tl.dot(v, do.T, input_precision=PRECISION) - delta[None, :]) * slope
                seen = sees(m, low, high, ROWS)
                do, bad_do = split_finite(do)
                p = tl.where(seen, tl.where(bad_do[None, :], float("nan"), p), 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                q, bad_q = split_finite(q)
                ds = tl.where(seen, tl.where(bad_q[None, :], float("nan"), ds), 0.0)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        store_tile(dk_base, dk * scale, n, num_keys, dk_token_stride, HEAD_DIM, ROWS, BLOCK_K)
        store_tile(dv_base, dv, n, num_keys, dv_token_stride, VALUE_DIM, ROWS, BLOCK_V)
