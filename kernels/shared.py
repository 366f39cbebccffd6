"""What several ops share: inputs as rows, and maths inside kernels."""

import math
from typing import Any

from torch import Tensor

from .dispatch import HAS_TRITON, jit, tl

# exp(x) = exp2(LOG2_E x) and log(x) = LN_2 log2(x): powers of 2 are what the hardware has. Attention's kernels write
# shared.LOG2_E, because at each launch Triton compares the constants among a kernel's own globals with their first values.
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
    """Return tanh(x), exact to rounding near 0 too, with NaN kept; the interpreter has none."""
    # Near 0, where 1 - 2 / (exp(2x) + 1) cancels, an odd minimax polynomial: the coefficients are those of CUDA's tanhf.
    square = x * x
    series = ((1.57394409e-2 * square - 5.23025580e-2) * square + 1.33152470e-1) * square - 3.33327681e-1
    small = x + x * (square * series)
    # Squared, the root of the reciprocal is one instruction where a division is six. Infinity ends at 1 by itself.
    magnitude = tl.abs(x)
    root = tl.rsqrt(tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
    large = 1.0 - 2.0 * root * root
    return tl.where(magnitude < 0.55, small, tl.where(x < 0.0, -large, large))
