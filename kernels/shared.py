"""What several ops share: inputs as rows, and maths inside kernels."""

import math
from typing import Any

from torch import Tensor

from .dispatch import HAS_TRITON, jit, tl

# exp(x) = exp2(LOG2_E x) and log(x) = LN_2 log2(x): powers of 2 are what the hardware has.
LOG2_E: Any = tl.constexpr(math.log2(math.e)) if HAS_TRITON else None
LN_2: Any = tl.constexpr(math.log(2)) if HAS_TRITON else None


def as_rows(x: Tensor) -> Tensor:
    """Return `x` (..., D) as (rows, D); copied only where no one stride reaches its rows or their elements are no neighbours.

    Slices and rows repeated by a stride of 0 are fine: the kernels take their stride.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@jit
def tanh(x):
    """Return tanh(x), exact to rounding near 0 too; the interpreter has none."""
    # Lambert's continued fraction to the fifth level is exact to rounding below 0.6, where 1 - 2 / (exp(2x) + 1) cancels.
    square = x * x
    small = tl.abs(x) < 0.6
    # Compared, because the hardware's minimum would lose a NaN.
    exponential = tl.exp(2.0 * tl.where(x > 10.0, 10.0, x))
    numerator = tl.where(small, x * (945.0 + square * (105.0 + square)), exponential - 1.0)
    return numerator / tl.where(small, 945.0 + square * (420.0 + 15.0 * square), exponential + 1.0)
