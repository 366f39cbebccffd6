"""Keep masked values out of the results of the Hopper kernels: recompute rows whose result holds a NaN.

As in `isolated`, the recomputation starts from the stored lse, but it uses no matrix products: it goes key by key, or query by
query, for 16 rows at a time. It is slow and short: a NaN in a result is rare, and ends most training runs.
"""

from typing import Any

from ..dispatch import HAS_TRITON, tl
from .gluon import gl, gluon
from .intervals import key_tiles, keys_of, queries_of, query_tiles
from .scores import load_lse, lse_in_bits, probabilities_of
from .tiles import stride_unit

# Rows that four warps process at a time.
ROWS: Any = tl.constexpr(16) if HAS_TRITON else None


@gluon.jit
def has_nan(x):
    """Return 1 if a tile (M, N) holds a NaN, or if infinities of both signs meet in the sum of a row; else 0."""
    # Each warp holds the sums of all 64 rows, so the reduction needs no predicated loads, which occupy registers.
    sums = gl.convert_layout(gl.sum(x, 1), gl.BlockedLayout([2], [32], [4], [0]))
    # An integer reduction hides from the compiler that the result is 0 or 1; see `later_zero`.
    return gl.max((sums != sums).to(gl.int32), 0)


@gluon.jit
def load_row(base, row, token_stride, channels, HEAD_DIM: tl.constexpr):
    """Return one row (K) of a head in float32."""
    address = base + gl.cast(row, gl.int64) * token_stride * stride_unit(base)
    return gl.load(address + channels, mask=channels < HEAD_DIM, other=0.0).to(gl.float32)


@gluon.jit
def load_rows(base, rows, end, token_stride, channels, HEAD_DIM: tl.constexpr):
    """Return rows (ROWS, K) of a head in float32, with 0 from row `end` on."""
    address = base + (rows.to(gl.int64) * token_stride * stride_unit(base))[:, None] + channels[None, :]
    return gl.load(address, mask=(rows < end)[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(gl.float32)


@gluon.jit
def store_rows(base, x, rows, end, token_stride, channels, HEAD_DIM: tl.constexpr):
    """Store rows (ROWS, K) of a head up to row `end`; `token_stride` is in elements."""
    address = base + (rows.to(gl.int64) * token_stride)[:, None] + channels[None, :]
    gl.store(address, x.to(base.dtype.element_ty), mask=(rows < end)[:, None] & (channels < HEAD_DIM)[None, :])


@gluon.jit
def store_isolated_output(
    bases, token_strides, lse_ptr, first, last, mask,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the output of queries `first` to `last` of a head."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_base, k_base, v_base, o_base = bases
    q_token_stride, k_token_stride, v_token_stride, o_token_stride = token_strides
    channels = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    # Other threads wrote lse.
    tl.debug_barrier()
    for m in range(first, last, ROWS):
        queries = m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
        start, left, full_start, full_end, masked = query_tiles(m, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, 1)
        q = load_rows(q_base, queries, mask[0], q_token_stride, channels, HEAD_DIM)
        lse = load_lse(lse_ptr, queries, mask[0])
        o = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
        for n in range(start, full_end + masked - left):
            k = load_row(k_base, n, k_token_stride, channels, HEAD_DIM)
            v = load_row(v_base, n, v_token_stride, channels, VALUE_DIM)
            p, slope = probabilities_of(gl.sum(q * k[None, :], 1), lse, scale, softcap)
            seen = (n >= low) & (n < high)
            o += gl.where(seen[:, None], p[:, None] * v[None, :], 0.0)
        store_rows(o_base, o, queries, mask[0], o_token_stride, channels, VALUE_DIM)


@gluon.jit
def store_isolated_dq(
    bases, token_strides, lse_ptr, delta_ptr, first, last, mask,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write dq of queries `first` to `last` of a head."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_base, k_base, v_base, do_base, o_base, dq_base = bases
    channels = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    # Other threads wrote delta.
    tl.debug_barrier()
    for m in range(first, last, ROWS):
        queries = m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        low, high = keys_of(queries, mask, CAUSAL, WINDOW, DOCUMENTS)
        start, left, full_start, full_end, masked = query_tiles(m, mask, CAUSAL, WINDOW, DOCUMENTS, ROWS, 1)
        q = load_rows(q_base, queries, mask[0], token_strides[0], channels, HEAD_DIM)
        do = load_rows(do_base, queries, mask[0], token_strides[3], channels, VALUE_DIM)
        lse = load_lse(lse_ptr, queries, mask[0])
        delta = gl.load(delta_ptr + queries, mask=queries < mask[0], other=0.0)
        dq = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
        for n in range(start, full_end + masked - left):
            k = load_row(k_base, n, token_strides[1], channels, HEAD_DIM)
            v = load_row(v_base, n, token_strides[2], channels, VALUE_DIM)
            p, slope = probabilities_of(gl.sum(q * k[None, :], 1), lse, scale, softcap)
            ds = p * (gl.sum(do * v[None, :], 1) - delta) * slope
            seen = (n >= low) & (n < high)
            dq += gl.where(seen[:, None], ds[:, None] * k[None, :], 0.0)
        store_rows(dq_base, dq * scale, queries, mask[0], token_strides[5], channels, HEAD_DIM)


@gluon.jit
def store_isolated_dk_dv(
    bases, dk_base, dv_base, lse_ptr, delta_ptr, strides, dk_token_stride, dv_token_stride, group_size, first, last, mask,
    scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of keys `first` to `last`, from the queries of `group_size` heads."""
    LAYOUT: tl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_base, k_base, v_base, do_base = bases
    channels = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    for n in range(first, last, ROWS):
        keys = n + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        low, high = queries_of(keys, mask, CAUSAL, WINDOW, DOCUMENTS)
        high = gl.where(keys < mask[1], high, 0)
        start, left, full_start, full_end, masked = key_tiles(n, mask, CAUSAL, WINDOW, DOCUMENTS, 1, ROWS)
        k = load_rows(k_base, keys, last, strides[5], channels, HEAD_DIM)
        v = load_rows(v_base, keys, last, strides[8], channels, VALUE_DIM)
        dk = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
        dv = gl.zeros([ROWS, WIDTH], gl.float32, LAYOUT)
        for i in range(group_size):
            q_of_head = q_base + gl.cast(i, gl.int64) * strides[1] * stride_unit(q_base)
            do_of_head = do_base + gl.cast(i, gl.int64) * strides[10] * stride_unit(do_base)
            statistics = gl.cast(i, gl.int64) * mask[0]
            for m in range(start, full_end + masked - left):
                q = load_row(q_of_head, m, strides[2], channels, HEAD_DIM)
                do = load_row(do_of_head, m, strides[11], channels, VALUE_DIM)
                lse = lse_in_bits(gl.load(lse_ptr + statistics + m))
                p, slope = probabilities_of(gl.sum(k * q[None, :], 1), lse, scale, softcap)
                ds = p * (gl.sum(v * do[None, :], 1) - gl.load(delta_ptr + statistics + m)) * slope
                seen = ((m >= low) & (m < high))[:, None]
                dv += gl.where(seen, p[:, None] * do[None, :], 0.0)
                dk += gl.where(seen, ds[:, None] * q[None, :], 0.0)
        store_rows(dk_base, dk * scale, keys, last, dk_token_stride, channels, HEAD_DIM)
        store_rows(dv_base, dv, keys, last, dv_token_stride, channels, VALUE_DIM)
