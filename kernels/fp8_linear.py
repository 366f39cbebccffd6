"""Linear maps in 8 bits: y = x W^T and its two gradients, with operands rounded by fused kernels (Micikevicius et al. 2022).

x and W are rounded to e4m3; dy to e5m2 with one scale a tensor, to e4m3 with one scale a row. Hopper's tensor cores need both
8-bit operands contiguous along the summed dimension, so all three matrices are also kept transposed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import fp8_reference
from .checks import FLOATING, check_device, check_dtype
from .dispatch import autocast_dtype, use_triton
from .fp8_kernels import MAX_ROW, Quantised, fp8_linear_amax, fp8_linear_cast, fp8_linear_rows, quantise
from .fp8_reference import AmaxHistory, gradient_dtype
from .op import Arguments, Cost, Costs, Op, draw, record
from .registration import custom_op

ALIGNMENT = 16
"""PyTorch's 8-bit products need multiples of this for rows, inputs and outputs."""


def _product(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Return a b^T of 8-bit a (M, K), b (N, K); `fast` sums in tensor-core precision, as torchao does in the forward pass."""
    if a.is_meta:
        return torch.empty(len(a), len(b), dtype=dtype, device=a.device)
    if not a.is_cuda:
        return fp8_reference.scaled_product(a, b, inverse_a, inverse_b, dtype)
    # PyTorch's products with rowwise scales write bfloat16 only.
    written = torch.bfloat16 if inverse_a.dim() else dtype
    inverse_b = inverse_b.T if inverse_b.dim() else inverse_b
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(a, b.T, inverse_a, inverse_b, out_dtype=written, use_fast_accum=fast).to(dtype)


@custom_op("fp8_linear", mutates_args=("seen",))
def _fp8_linear(
    x: Tensor, weight: Tensor, rowwise: bool, known: Tensor | None, seen: Tensor | None, seen_gradient: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Returns y (M, N), and for the backward pass x^T and W^T, each with its inverse scales. The 8-bit outputs are uint8,
    # because PyTorch cannot compare float8 tensors.
    operands: list[Quantised] = []
    for i, tensor in enumerate((x, weight)):
        history = (None, None) if known is None or seen is None else (known[i], seen[i])
        operands.append(quantise(tensor, torch.float8_e4m3fn, rowwise, *history))
    x_q, w_q = operands
    y = _product(x_q.rows, w_q.rows, x_q.row_inverses, w_q.row_inverses, x.dtype, fast=True)
    x_t, w_t = (q.columns.view(torch.uint8) for q in operands)
    return y, x_t, x_q.column_inverses, w_t, w_q.column_inverses


@_fp8_linear.register_fake
def _(x, weight, rowwise, known, seen, seen_gradient):
    (m, k), n = x.shape, len(weight)
    inverses = [x.new_empty((k, 1) if rowwise else (), dtype=torch.float32) for _ in range(2)]
    x_t, w_t = (x.new_empty(k, size, dtype=torch.uint8) for size in (m, n))
    return x.new_empty(m, n), x_t, inverses[0], w_t, inverses[1]


@custom_op("fp8_linear_backward", mutates_args=("seen",))
def _fp8_linear_backward(
    dy: Tensor, x_t: Tensor, x_inverse: Tensor, w_t: Tensor, w_inverse: Tensor, known: Tensor | None, seen: Tensor | None,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rowwise = x_inverse.dim() > 0
    history = (None, None) if known is None or seen is None else (known[2], seen[0])
    x_t, w_t = (t.view(torch.float8_e4m3fn) for t in (x_t, w_t))
    q = quantise(dy.contiguous(), gradient_dtype(rowwise), rowwise, *history)
    dx = _product(q.rows, w_t, q.row_inverses, w_inverse, dy.dtype) if needs_x else dy.new_empty(0)
    dweight = _product(q.columns, x_t, q.column_inverses, x_inverse, dy.dtype) if needs_weight else dy.new_empty(0)
    return dx, dweight


@_fp8_linear_backward.register_fake
def _(dy, x_t, x_inverse, w_t, w_inverse, known, seen, needs_x, needs_weight):
    (k, m), n = x_t.shape, dy.shape[1]
    return dy.new_empty((m, k) if needs_x else 0), dy.new_empty((n, k) if needs_weight else 0)


def _save(ctx, inputs, output) -> None:
    *_, ctx.known, _, ctx.seen_gradient = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dy: Tensor, *_):
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx, dweight = _fp8_linear_backward(dy, *ctx.saved_tensors, ctx.known, ctx.seen_gradient, needs_x, needs_weight)
    return dx if needs_x else None, dweight if needs_weight else None, None, None, None, None


_fp8_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.tilewright.fp8_linear)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


@register_flop_formula(torch.ops.tilewright.fp8_linear_backward)
def _backward_flops(dy_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    *_, needs_x, needs_weight = args
    return 2 * dy_shape[0] * dy_shape[1] * x_shape[0] * (needs_x + needs_weight)


def fp8_linear(x: Tensor, weight: Tensor, *, rowwise: bool = False, history: AmaxHistory | None = None) -> Tensor:
    """Return x W^T with operands in 8 bits, forward and backward, summed in float32: (..., K), (N, K) -> (..., N).

    x, weight, result and gradients share one dtype (float32, float16 or bfloat16). K, N and the number of rows must be
    multiples of 16. By default each tensor has one float32 scale, 448 / amax, that maps its largest magnitude to the end of
    the 8-bit range. With `rowwise`, each row has a scale, and each column in the transposed operands. These scales are rounded
    down to powers of two, so that an element has the same digits in both copies. With a `history` (delayed scaling), scales
    come from previous steps, larger values are clamped, and the magnitudes of this step are recorded. NaN and infinities give
    NaN in the result. The backward pass keeps 8-bit copies of x and W. Needs compute capability 8.9; other devices, and
    float64, run the reference.
    """
    check_dtype(FLOATING, x=x, weight=weight)
    check_device(x=x, weight=weight)
    if (dtype := autocast_dtype(x)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    _check(x, weight, rowwise, history)
    if x.numel() == 0:
        return F.linear(x, weight)
    if not use_triton(x, weight):
        return fp8_reference.fp8_linear(x, weight, rowwise=rowwise, history=history)
    known, seen, seen_gradient = history or (None, None, None)
    y, *_ = _fp8_linear(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), rowwise, known, seen, seen_gradient)
    return y.view(*x.shape[:-1], -1)


def _check(x: Tensor, weight: Tensor, rowwise: bool, history: AmaxHistory | None) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: expected (..., K) and (N, K)")
    if x.dtype != weight.dtype:
        raise ValueError(f"x has dtype {x.dtype}, weight {weight.dtype}: expected equal dtypes")
    (n, k), m = weight.shape, x.numel() // max(1, x.shape[-1])
    if m % ALIGNMENT or n % ALIGNMENT or k % ALIGNMENT:
        raise ValueError(f"x has {m} rows of {k}, weight {n} rows: expected multiples of {ALIGNMENT}")
    if rowwise and max(n, k) > MAX_ROW:
        raise ValueError(f"weight has shape {(n, k)}: expected at most {MAX_ROW} in each dimension with rowwise")
    if rowwise and history is not None:
        raise ValueError("history is given with rowwise: expected only one of the two")


def _arguments(device: torch.device, dtype: torch.dtype, rows: int, d_in: int, d_out: int, rowwise: bool = False) -> Arguments:
    return Arguments((draw(device, dtype, rows, d_in), draw(device, dtype, d_out, d_in)), {"rowwise": rowwise})


def _costs(itemsize: int, rows: int, d_in: int, d_out: int, **_: Any) -> Costs:
    # Each operand is read once, written twice in 8 bits, and read by its matrix products.
    x, weight, y = rows * d_in, d_out * d_in, rows * d_out
    flops = 2 * rows * d_in * d_out
    forward = Cost((itemsize + 3) * (x + weight) + itemsize * y, flops)
    return Costs.of(forward, Cost((itemsize + 4) * y + (itemsize + 1) * (x + weight), 2 * flops))


record(
    Op(
        function=fp8_linear,
        reference=fp8_reference.fp8_linear,
        kernels=(fp8_linear_amax, fp8_linear_cast, fp8_linear_rows),
        arguments=_arguments,
        cost=_costs,
        # The feed-forward products of Llama 3 8B: up (gate and up packed) and down.
        shapes=tuple(
            {"rows": 8192, "d_in": d_in, "d_out": d_out, "rowwise": rowwise}
            for d_in, d_out in ((4096, 28672), (14336, 4096))
            for rowwise in (False, True)
        ),
        examples=({"rows": 32, "d_in": 48, "d_out": 64}, {"rows": 16, "d_in": 64, "d_out": 32, "rowwise": True}),
        compiled=tuple(
            {"rows": 8192, "d_in": 4096, "d_out": 14336, "rowwise": rowwise, "dtype": dtype}
            for rowwise in (False, True)
            for dtype in (torch.bfloat16, torch.float32)
        ),
        over="d_in",
        bound_by="flops",
        products="fp8",
        capability=89,
    )
)
