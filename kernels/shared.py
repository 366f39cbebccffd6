"""Helpers of several ops: inputs as rows, and math functions for kernels."""

import math
from typing import Any

from torch import Tensor

from .dispatch import HAS_TRITON, jit, tl

# exp(x) = exp2(LOG2_E x) and log(x) = LN_2 log2(x), because the hardware computes powers of 2. Attention kernels write
# `shared.LOG2_E`: at each launch Triton compares the constants among a kernel's own globals with their first values.
LOG2_E: Any = tl.constexpr(math.log2(math.e)) if HAS_TRITON else None
LN_2: Any = tl.constexpr(math.log(2)) if HAS_TRITON else None


def as_rows(x: Tensor) -> Tensor:
    """Return `x` (..., D) as (rows, D). Copies unless rows are evenly strided and contiguous.

    Slices and rows repeated by a stride of 0 are not copied: the kernels take the row stride.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@jit
def tanh(x):
    """Return tanh(x), accurate to rounding near 0 too; NaN gives NaN. Triton's interpreter has no tanh."""
    # Near 0, where 1 - 2 / (exp(2x) + 1) cancels, use an odd minimax polynomial with the coefficients of CUDA's tanhf.
    square = x * x
    series = ((1.57394409e-2 * square - 5.23025580e-2) * square + 1.33152470e-1) * square - 3.33327681e-1
    small = x + x * (square * series)
    # The squared reciprocal root costs one instruction for the root, a division costs six. Infinity gives 1.
    magnitude = tl.abs(x)
    root = tl.rsqrt(tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
    large = 1.0 - 2.0 * root * root
    return tl.where(magnitude < 0.55, small, tl.where(x < 0.0, -large, large))
