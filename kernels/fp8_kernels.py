"""Quantization of matrices to 8 bits, each with a transposed copy: kernels and launches.

Magnitudes are compared as integers, by their bits, which ascend with the values and put NaN above all. A NaN therefore reaches
the scale, atomic maxima do not depend on their order, and equal inputs give equal bits. x (M, N) is read once if its scales are
known or belong to rows; otherwise twice, for the scale and for the copies.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .device import num_sms
from .dispatch import interpreting, jit, tl
from .launch import launch

MAX_ROW = 32768
"""Longest row that a program holds in registers."""


@jit
def magnitude(x):
    """Return the bits of the absolute value of float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def scale_of(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Return the scale for a largest magnitude; see `fp8_reference.scales`."""
    scale = tl.div_rn(LARGEST, tl.maximum(amax, 1e-12))
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan"))


@jit
def rounded(x, dtype: tl.constexpr, LARGEST: tl.constexpr, EMULATED: tl.constexpr):
    """Round scaled values to 8 bits, clamped to the range; values that are not finite give NaN."""
    finite = tl.abs(x) < float("inf")
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if EMULATED:
        # The cast of Triton's interpreter loses carries from mantissa to exponent, and all subnormals. Round first, so that the
        # cast is exact: by Veltkamp's split, or, for subnormals, by a sum whose last bit is the smallest 8-bit number.
        split = 1048577.0 if LARGEST == 448.0 else 2097153.0
        least = 24576.0 if LARGEST == 448.0 else 192.0
        normal = 0.015625 if LARGEST == 448.0 else 6.103515625e-05
        high = x * split
        x = tl.where(tl.abs(x) < normal, (x + least) - least, high - (high - x))
    # Not every cast keeps a NaN.
    bits = tl.where(finite, x.to(dtype).to(tl.uint8, bitcast=True), 0x7F)
    return bits.to(tl.uint8).to(dtype, bitcast=True)


@jit
def fp8_linear_amax(x_ptr, amax_ptr, known_ptr, numel, num_programs, BLOCK: tl.constexpr):
    """Raise the bits of amax to the largest magnitude of x, unless `known` holds a magnitude."""
    end = numel
    if known_ptr is not None:
        end = tl.where(tl.load(known_ptr) > 0.0, 0, end)
    seen = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, num_programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = tl.maximum(seen, magnitude(tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)))
    tl.atomic_max(amax_ptr, tl.max(seen, axis=0), sem="relaxed")


@jit(do_not_specialize=("num_column_blocks",))
def fp8_linear_cast(
    x_ptr,
    q_ptr,
    t_ptr,
    inverse_ptr,
    amax_ptr,
    known_ptr,
    seen_ptr,
    num_rows,
    num_columns,
    num_column_blocks,
    LARGEST: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    EMULATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write one tile in 8 bits, untransposed (unless q is None) and transposed, with one scale or one a column."""
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % num_column_blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    x = tl.load(x_ptr + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if BY_COLUMN:
        amax = tl.load(amax_ptr + columns, mask=columns < num_columns, other=0).to(tl.float32, bitcast=True)
        scale = scale_of(amax, LARGEST, True)
        tl.store(inverse_ptr + columns, tl.div_rn(1.0, scale), mask=(columns < num_columns) & (program < num_column_blocks))
        q = rounded(x * scale[None, :], t_ptr.dtype.element_ty, LARGEST, EMULATED)
    else:
        amax = tl.load(amax_ptr).to(tl.float32, bitcast=True)
        if known_ptr is not None:
            known = tl.load(known_ptr)
            amax = tl.where(known > 0.0, known, amax)
            tl.atomic_max(seen_ptr, tl.max(tl.ravel(magnitude(x)), axis=0), sem="relaxed")
        scale = scale_of(amax, LARGEST, False)
        tl.store(inverse_ptr, tl.div_rn(1.0, scale), mask=program == 0)
        q = rounded(x * scale, t_ptr.dtype.element_ty, LARGEST, EMULATED)
    if q_ptr is not None:
        tl.store(q_ptr + rows[:, None] * num_columns + columns[None, :], q, mask=mask)
    tl.store(t_ptr + columns[:, None] * num_rows + rows[None, :], tl.trans(q), mask=tl.trans(mask))


@jit
def fp8_linear_rows(
    x_ptr,
    q_ptr,
    inverse_ptr,
    column_amax_ptr,
    num_rows,
    num_columns,
    num_programs,
    LARGEST: tl.constexpr,
    EMULATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write rows in 8 bits, each with its own scale, and raise the bits of the largest magnitude of each column."""
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    seen = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.int32)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK_ROWS, num_rows, num_programs * BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < num_rows) & (columns < num_columns)
        x = tl.load(x_ptr + rows * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
        bits = magnitude(x)
        seen = tl.maximum(seen, bits)
        scale = scale_of(tl.max(bits, axis=1, keep_dims=True).to(tl.float32, bitcast=True), LARGEST, True)
        tl.store(inverse_ptr + rows, tl.div_rn(1.0, scale), mask=rows < num_rows)
        tl.store(q_ptr + rows * num_columns + columns, rounded(x * scale, q_ptr.dtype.element_ty, LARGEST, EMULATED), mask=mask)
    ends = tl.arange(0, BLOCK_COLUMNS)
    tl.atomic_max(column_amax_ptr + ends, tl.max(seen, axis=0), mask=ends < num_columns, sem="relaxed")


class Quantised(NamedTuple):
    """A matrix (M, N) in 8 bits, with its float32 inverse scales."""

    rows: Tensor
    """(M, N)."""
    row_inverses: Tensor
    """(M, 1), or () for one scale."""
    columns: Tensor
    """(N, M), transposed in memory."""
    column_inverses: Tensor
    """(N, 1), or ()."""


def empty_quantised(x: Tensor, dtype: torch.dtype, rowwise: bool) -> Quantised:
    """Allocate the result for x (M, N)."""
    (m, n), inverse = x.shape, {"dtype": torch.float32, "device": x.device}
    one = torch.empty((), **inverse)
    row, column = (torch.empty(size, 1, **inverse) if rowwise else one for size in (m, n))
    return Quantised(x.new_empty(m, n, dtype=dtype), row, x.new_empty(n, m, dtype=dtype), column)


# Tile shape. Both copies are written in runs of 64 or 128 bytes.
BLOCK_ROWS, BLOCK_COLUMNS = 64, 128
AMAX_BLOCK = 4096
PROGRAMS_PER_SM = 4


def quantise(
    x: Tensor, dtype: torch.dtype, rowwise: bool, known: Tensor | None = None, seen: Tensor | None = None
) -> Quantised:
    """Round a contiguous x (M, N) and its transpose with one scale; with `rowwise`, one scale for each row of either.

    If `known` () float32 is above 0, the scale is computed from it, and `seen` is raised to the actual largest magnitude.
    """
    out, (m, n) = empty_quantised(x, dtype, rowwise), x.shape
    shared = {"LARGEST": torch.finfo(dtype).max, "EMULATED": interpreting()}
    amax = torch.zeros(n if rowwise else (), dtype=torch.int32, device=x.device)
    most = PROGRAMS_PER_SM * num_sms(x.device)
    if rowwise:
        width = 1 << (n - 1).bit_length()
        block_rows = max(1, 4096 // width)
        programs = min(-(-m // block_rows), most)
        sizes = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": width, "num_warps": max(4, min(32, width // 512))}
        launch(fp8_linear_rows, programs, x, out.rows, out.row_inverses, amax, m, n, programs, **shared, **sizes)
    else:
        programs = min(-(-x.numel() // AMAX_BLOCK), most)
        launch(fp8_linear_amax, programs, x, amax, known, x.numel(), programs, BLOCK=AMAX_BLOCK, num_warps=8)
    blocks = -(-n // BLOCK_COLUMNS)
    bits = None if seen is None else seen.view(torch.int32)
    launch(
        fp8_linear_cast, -(-m // BLOCK_ROWS) * blocks, x, None if rowwise else out.rows, out.columns, out.column_inverses,
        amax, known, bits, m, n, blocks, BY_COLUMN=rowwise, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=8,
        **shared,
    )  # fmt: skip
    return out
