"""Linear maps with operands rounded to 8 bits, in plain PyTorch: the specification, the CPU path and the test oracle.

Shapes as in `fp8_linear`: `M` rows, `K` inputs, `N` outputs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_forward_mode

SMALLEST_AMAX = 1e-12
"""Lower bound of the largest magnitude, so that the scale of a zero tensor is finite."""


class AmaxHistory(NamedTuple):
    """Largest magnitudes for delayed scaling of a linear map, float32: from previous steps, and from the current step."""

    known: Tensor
    """(3): largest magnitudes of x, weight and dy in previous steps; 0 if unknown."""
    seen: Tensor
    """(2): largest magnitudes of x and weight in the current step."""
    seen_gradient: Tensor
    """(1): largest magnitude of dy in the current step."""


def gradient_dtype(rowwise: bool) -> torch.dtype:
    """Return the dtype of dy: e5m2, which has the range that a single scale needs; e4m3 with a scale for each row."""
    return torch.float8_e4m3fn if rowwise else torch.float8_e5m2


def scales(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return the scale that maps magnitudes up to `amax` (float32) to the range of `dtype`, and its inverse.

    Both are NaN if `amax` is not finite.
    """
    # Divide two tensors: number / tensor multiplies by the reciprocal, which rounds twice.
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax.clamp(min=SMALLEST_AMAX)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    return scale, scale.reciprocal()


def quantise(x: Tensor, dtype: torch.dtype, dim: int | None = None, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round x (M, K) to an 8-bit `dtype`; return the rounded tensor and its float32 inverse scale.

    By default there is one float32 scale. With `dim`, there is a power-of-two scale for each slice along `dim`. If `known` ()
    is above 0, it replaces the tensor's own largest magnitude, and larger values are clamped. Infinities become NaN.
    """
    wide = x.float()
    amax = wide.abs().amax() if dim is None else wide.abs().amax(dim, keepdim=True)
    if known is not None:
        amax = torch.where(known > 0, known, amax)
    scale, inverse = scales(amax, dtype, power_of_two=dim is not None)
    scaled, largest = wide * scale, torch.finfo(dtype).max
    return torch.where(scaled.isfinite(), scaled.clamp(-largest, largest), torch.nan).to(dtype), inverse


def scaled_product(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b^T of 8-bit a (M, K), b (N, K), summed in float32; inverse scales are () each, or (M, 1) and (N, 1)."""
    return (a.float() @ b.float().T * (inverse_a * inverse_b.reshape(1, -1))).to(dtype)


def record_amax(x: Tensor, seen: Tensor) -> None:
    """Raise seen () to the largest magnitude of x."""
    seen.copy_(torch.maximum(seen, x.detach().abs().amax().float()))


class _Fp8Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, rowwise: bool, known: Any, seen: Any, seen_gradient: Any) -> tuple[Tensor, ...]:
        operands, kept = [], []
        for i, tensor in enumerate((x, weight)):
            before = None
            if known is not None:
                before = known[i]
                record_amax(tensor, seen[i])
            q, inverse = quantise(tensor, torch.float8_e4m3fn, 1 if rowwise else None, before)
            operands += [q, inverse]
            # The backward product sums over rows, so that it needs a scale for each column.
            kept += quantise(tensor, torch.float8_e4m3fn, 0) if rowwise else (q, inverse)
        x_q, x_inverse, w_q, w_inverse = operands
        return scaled_product(x_q, w_q, x_inverse, w_inverse, x.dtype), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, ctx.rowwise, ctx.known, _, ctx.seen_gradient = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return *_gradients(ctx, gradients[0]), None, None, None, None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, Any]:
    x_q, x_inverse, w_q, w_inverse = ctx.saved_tensors
    known, dtype = None, gradient_dtype(ctx.rowwise)
    if ctx.known is not None:
        known = ctx.known[2]
        record_amax(dy, ctx.seen_gradient[0])
    q, inverse = quantise(dy, dtype, 1 if ctx.rowwise else None, known)
    t, t_inverse = quantise(dy, dtype, 0) if ctx.rowwise else (q, inverse)
    dx = scaled_product(q, w_q.T, inverse, w_inverse, dy.dtype) if ctx.needs_input_grad[0] else None
    dweight = scaled_product(t.T, x_q.T, t_inverse.reshape(-1, 1), x_inverse, dy.dtype) if ctx.needs_input_grad[1] else None
    return dx, dweight


def _straight_through(x: Tensor, rowwise: bool) -> Tensor:
    # torch.compile does not support an autograd.Function that defines forward-mode derivatives.
    q, inverse = quantise(x.detach().flatten(0, -2), torch.float8_e4m3fn, 1 if rowwise else None)
    return x + ((q.float() * inverse).view_as(x) - x.detach())


def fp8_linear(x: Tensor, weight: Tensor, *, rowwise: bool = False, history: AmaxHistory | None = None) -> Tensor:
    """Return x W^T with operands rounded to 8 bits, forward and backward; see `kernels.fp8_linear`."""
    if is_forward_mode():
        return F.linear(*(_straight_through(t, rowwise) for t in (x, weight)))
    known, seen, seen_gradient = history or (None, None, None)
    y, *_ = _Fp8Linear.apply(x.flatten(0, -2), weight, rowwise, known, seen, seen_gradient)  # pyright: ignore[reportGeneralTypeIssues]
    return y.view(*x.shape[:-1], -1)
