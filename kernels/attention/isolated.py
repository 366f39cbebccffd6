"""Keep masked values out of the results: recompute a tile whose result holds a NaN.

The kernels give a masked pair the probability 0. In a matrix product that is not enough, because 0 times a non-finite value is
NaN: a later token would reach earlier queries that share its tile. A program whose result holds a NaN therefore recomputes it
from the stored lse. The recomputation replaces non-finite elements with 0 in the product, and sets the probability to NaN for
the rows that see them. It runs last in a program and processes few rows at a time, so that it needs fewer registers than the
main loop.
"""

from typing import Any

from ..dispatch import HAS_TRITON, jit, tl
from .intervals import key_tiles, keys_of, queries_of, query_tiles
from .scores import load_lse, probabilities_of, sees
from .tiles import load_tile, store_tile, stride_unit

# Queries and keys a step: the smallest size of a matrix instruction.
ROWS: Any = tl.constexpr(16) if HAS_TRITON else None


@jit
def has_nan(x):
    """Return 1 if a tile (M, N) holds a NaN, else 0."""
    return tl.max((x != x).to(tl.int32))


@jit
def later_zero(again):
    """Return 0, computed from the result of `has_nan`.

    `again` is 0 or 1, but the compiler cannot prove it. It therefore cannot hoist `x | later_zero(again)`, such as the
    addresses of the result, above the loops over tiles, where it would occupy registers. An addition does not work here,
    because the compiler reassociates additions.
    """
    return again >> 1


@jit
def split_finite(x):
    """Return a tile (N, K) with non-finite elements replaced by 0, and which of its rows (N) had such elements."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0), tl.min(finite.to(tl.int32), 1) == 0


@jit
def rows_from(base, start, end, token_stride):
    """Return pointers to ROWS rows of a head from token `start` on, and which of them are before `end`."""
    rows = tl.arange(0, ROWS)
    return base + (tl.cast(start, tl.int64) + rows) * token_stride * stride_unit(base), rows < end - start


@jit
def product_of(a, a_present, b, b_present, width, PRECISION: tl.constexpr):
    """Return a b^T (ROWS, ROWS) for pointers to rows, ROWS channels at a time to save registers.

    `width` must be opaque to the compiler: unrolling the loop would fill the registers with addresses.
    """
    product = tl.zeros((ROWS, ROWS), tl.float32)
    for channel in tl.range(0, width, ROWS, num_stages=1):
        channels = channel + tl.arange(0, ROWS)[None, :]
        a_tile = tl.load(a[:, None] + channels, mask=a_present[:, None] & (channels < width), other=0.0)
        b_tile = tl.load(b[:, None] + channels, mask=b_present[:, None] & (channels < width), other=0.0)
        product = tl.dot(a_tile, b_tile.T, product, input_precision=PRECISION)
    return product


@jit
def isolated_output(
    q, present, lse, low, high, k_base, v_base, k_token_stride, v_token_stride, start, stop, end, head_dim,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return the output (ROWS, V) of the queries at the pointers `q` over the keys from start to stop; lse is in bits."""
    o = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for n in tl.range(start, stop, ROWS, num_stages=1):
        k, k_present = rows_from(k_base, n, end, k_token_stride)
        products = product_of(q, present, k, k_present, head_dim, PRECISION)
        p, _ = probabilities_of(products, lse[:, None], scale, softcap)
        v, bad = split_finite(load_tile(v_base, 0, 0, n, end, v_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True))
        p = tl.where(sees(n, low, high, ROWS), tl.where(bad[None, :], float("nan"), p), 0.0)
        o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION)
    return o


@jit
def store_isolated_output(
    q_base, k_base, v_base, o_base, lse_ptr, q_token_stride, k_token_stride, v_token_stride, o_token_stride,
    first, last, mask, again,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Recompute the output of queries `first` to `last` of a head. `again` is 1, but must be opaque to the compiler."""
    # Other threads wrote lse and the output that is overwritten here.
    tl.debug_barrier()
    for m in tl.range(first, last, ROWS, num_stages=1):  # pyright: ignore
        queries = m + tl.arange(0, ROWS)
        low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
        start, left, _, full_end, masked = query_tiles(m, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, ROWS)
        stop = full_end + (masked - left) * ROWS
        q, present = rows_from(q_base, m, mask[0], q_token_stride)
        o = isolated_output(
            q, present, load_lse(lse_ptr, queries, mask[0]), low, high, k_base, v_base, k_token_stride, v_token_stride,
            start, stop, mask[1], HEAD_DIM * again, scale, softcap, PRECISION, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        store_tile(o_base, o, m, mask[0], o_token_stride, VALUE_DIM, ROWS, BLOCK_V)


@jit
def store_isolated_dq(
    q_base, k_base, v_base, do_base, dq_base, lse_ptr, delta_ptr,
    q_token_stride, k_token_stride, v_token_stride, do_token_stride, dq_token_stride, first, last, mask, again,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Recompute dq of the queries from `first` to `last` of a head. `again` is 1, but must be opaque to the compiler."""
    # Other threads wrote delta and the dq that is overwritten here.
    tl.debug_barrier()
    for m in tl.range(first, last, ROWS, num_stages=1):  # pyright: ignore
        queries = m + tl.arange(0, ROWS)
        low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
        start, left, _, full_end, masked = query_tiles(m, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, ROWS)
        stop = full_end + (masked - left) * ROWS
        q, present = rows_from(q_base, m, mask[0], q_token_stride)
        do, _ = rows_from(do_base, m, mask[0], do_token_stride)
        lse = load_lse(lse_ptr, queries, mask[0])
        delta = tl.load(delta_ptr + queries, mask=queries < mask[0], other=0.0)
        dq = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for n in tl.range(start, stop, ROWS, num_stages=1):
            k_rows, k_present = rows_from(k_base, n, mask[1], k_token_stride)
            v_rows, _ = rows_from(v_base, n, mask[1], v_token_stride)
            products = product_of(q, present, k_rows, k_present, HEAD_DIM * again, PRECISION)
            p, slope = probabilities_of(products, lse[:, None], scale, softcap)
            ds = p * (product_of(do, present, v_rows, k_present, VALUE_DIM * again, PRECISION) - delta[:, None]) * slope
            k, bad = split_finite(load_tile(k_base, 0, 0, n, mask[1], k_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True))
            ds = tl.where(sees(n, low, high, ROWS), tl.where(bad[None, :], float("nan"), ds), 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        store_tile(dq_base, dq * scale, m, mask[0], dq_token_stride, HEAD_DIM, ROWS, BLOCK_K)


@jit
def store_isolated_dk_dv(
    q_base, k_base, v_base, do_base, dk_base, dv_base, lse_ptr, delta_ptr,
    q_head_stride, q_token_stride, k_token_stride, v_token_stride, do_head_stride, do_token_stride,
    dk_token_stride, dv_token_stride, group_size, first, last, num_keys, mask, again,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Recompute dk and dv of the keys from `first` to `last` from the queries of `group_size` heads.

    `again` is 1, but must be opaque to the compiler.
    """
    # Other threads wrote the dk and dv that are overwritten here.
    tl.debug_barrier()
    for n in tl.range(first, last, ROWS, num_stages=1):  # pyright: ignore
        keys = n + tl.arange(0, ROWS)
        low, high = queries_of(keys, mask, CAUSAL, WINDOW, DOCUMENTS)
        start, left, _, full_end, masked = key_tiles(n, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, ROWS)
        stop = full_end + (masked - left) * ROWS
        high = tl.where(keys < mask[1], high, 0)
        k, present = rows_from(k_base, n, num_keys, k_token_stride)
        v, _ = rows_from(v_base, n, num_keys, v_token_stride)
        dk = tl.zeros((ROWS, BLOCK_K), tl.float32)
        dv = tl.zeros((ROWS, BLOCK_V), tl.float32)
        for i in tl.range(0, group_size, num_stages=1):
            q_of_head = q_base + tl.cast(i, tl.int64) * q_head_stride * stride_unit(q_base)
            do_of_head = do_base + tl.cast(i, tl.int64) * do_head_stride * stride_unit(do_base)
            statistics = tl.cast(i, tl.int64) * mask[0]
            for m in tl.range(start, stop, ROWS, num_stages=1):  # pyright: ignore
                queries = m + tl.arange(0, ROWS)
                q_rows, q_present = rows_from(q_of_head, m, mask[0], q_token_stride)
                do_rows, _ = rows_from(do_of_head, m, mask[0], do_token_stride)
                lse = load_lse(lse_ptr + statistics, queries, mask[0])
                delta = tl.load(delta_ptr + statistics + queries, mask=queries < mask[0], other=0.0)
                products = product_of(k, present, q_rows, q_present, HEAD_DIM * again, PRECISION)
                p, slope = probabilities_of(products, lse[None, :], scale, softcap)
                ds = p * (product_of(v, present, do_rows, q_present, VALUE_DIM * again, PRECISION) - delta[None, :]) * slope
                seen = sees(m, low, high, ROWS)
                do = load_tile(do_of_head, 0, 0, m, mask[0], do_token_stride, VALUE_DIM, ROWS, BLOCK_V, False, True)
                do, bad = split_finite(do)
                p = tl.where(seen, tl.where(bad[None, :], float("nan"), p), 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                q = load_tile(q_of_head, 0, 0, m, mask[0], q_token_stride, HEAD_DIM, ROWS, BLOCK_K, False, True)
                q, bad = split_finite(q)
                ds = tl.where(seen, tl.where(bad[None, :], float("nan"), ds), 0.0)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        store_tile(dk_base, dk * scale, n, num_keys, dk_token_stride, HEAD_DIM, ROWS, BLOCK_K)
        store_tile(dv_base, dv, n, num_keys, dv_token_stride, VALUE_DIM, ROWS, BLOCK_V)
