"""Linear maps whose operands are rounded to 8 bits, in plain PyTorch: the specification, the CPU path and the oracle.

Letters as in `fp8_linear`: `M` rows, `K` inputs, `N` outputs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_forward_mode

SMALLEST_AMAX = 1e-12
"""What a smaller largest magnitude is taken for, so that a tensor of zeros has a scale."""


class AmaxHistory(NamedTuple):
    """What delayed scaling knows of a linear map, and what it sees while a step runs; float32."""

    known: Tensor
    """(3): the largest magnitudes of x, weight and dy in the steps before; 0: none is known."""
    seen: Tensor
    """(2): those of x and weight in this step."""
    seen_gradient: Tensor
    """(1): that of dy in this step."""


def gradient_dtype(rowwise: bool) -> torch.dtype:
    """Return the dtype of dy: e5m2, whose range holds what one scale cannot reach; with a scale for each row e4m3."""
    return torch.float8_e4m3fn if rowwise else torch.float8_e5m2


def scales(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return what to multiply by, so that magnitudes up to `amax` (float32) fill the range of `dtype`, and its inverse; NaN
    where `amax` is not finite."""
    # A number over a tensor would be a product with the reciprocal, which rounds twice.
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax.clamp(min=SMALLEST_AMAX)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    return scale, scale.reciprocal()


def quantise(x: Tensor, dtype: torch.dtype, dim: int | None = None, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round x (M, K) to an 8-bit `dtype`; return it and the float32 factor that undoes its scale.

    The scale is float32, of the whole tensor; or a power of two, of what lies along `dim`. `known` (), where it is above 0,
    stands in place of the tensor's own largest magnitude, and what lies beyond is cut off. Infinities become NaN.
    """
    wide = x.float()
    amax = wide.abs().amax() if dim is None else wide.abs().amax(dim, keepdim=True)
    if known is not None:
        amax = torch.where(known > 0, known, amax)
    scale, inverse = scales(amax, dtype, power_of_two=dim is not None)
    scaled, largest = wide * scale, torch.finfo(dtype).max
    return torch.where(scaled.isfinite(), scaled.clamp(-largest, largest), torch.nan).to(dtype), inverse


def scaled_product(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b^T of 8-bit a (M, K), b (N, K), summed in float32; inverse scales of one element, or (M, 1) and (N, 1)."""
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
            # Along the rows, which the other product sums, the scales are others.
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
    # torch.compile takes no autograd.Function that has forward-mode derivatives as well.
    q, inverse = quantise(x.detach().flatten(0, -2), torch.float8_e4m3fn, 1 if rowwise else None)
    return x + ((q.float() * inverse).view_as(x) - x.detach())


def fp8_linear(x: Tensor, weight: Tensor, *, rowwise: bool = False, history: AmaxHistory | None = None) -> Tensor:
    """Return x W^T of operands that are rounded to 8 bits, forward and backward; see `kernels.fp8_linear`."""
    if is_forward_mode():
        return F.linear(*(_straight_through(t, rowwise) for t in (x, weight)))
    known, seen, seen_gradient = history or (None, None, None)
    y, *_ = _Fp8Linear.apply(x.flatten(0, -2), weight, rowwise, known, seen, seen_gradient)  # pyright: ignore[reportGeneralTypeIssues]
    return y.view(*x.shape[:-1], -1)
