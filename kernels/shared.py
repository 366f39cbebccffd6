"""What several ops share: inputs as rows, the FLOP formula of those that multiply no matrices, and maths inside kernels."""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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


def count_no_flops(*ops: Any) -> None:
    """Register a formula of 0: FlopCounterMode counts matrix products only, and this says that the ops were not forgotten."""
    register_flop_formula(ops)(lambda *args, **kwargs: 0)


def register_fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what `op` returns on tensors that hold nothing, as `op.register_fake` does."""
    # For an op that it does not know, Inductor of PyTorch 2.11 writes a message of all that the arguments are computed from,
    # each use anew: its length is exponential in the layers below the loss. An op is traced before it is lowered, so that
    # Inductor can be told of it in time.
    if torch.__version__ >= "2.13":
        return op.register_fake

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @op.register_fake
        @functools.wraps(fake)
        def known_to_inductor(*args: Any, **kwargs: Any) -> Any:
            _tell_inductor(op._opoverload)
            return fake(*args, **kwargs)

        return fake

    return register


def _tell_inductor(op: torch._ops.OpOverload) -> None:
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and op not in lowering.lowerings:
        tag = lowering.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag))


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
