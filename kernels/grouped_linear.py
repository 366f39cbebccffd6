"""Grouped linear maps: each group of rows is multiplied by its own matrix, as in a mixture of experts.

PyTorch computes the products. They are registered as ops, so that FLOP counters see them and torch.compile supports all dtypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .registration import custom_op

_ALIGNMENT = 16
"""PyTorch's grouped products need rows of a multiple of this many bytes."""


def _has_kernel(*operands: Tensor) -> bool:
    # For other dtypes PyTorch loops over the groups too, and it does not support float64.
    return all(x.dtype == torch.bfloat16 and 2 * size % _ALIGNMENT == 0 for x in operands for size in x.shape[-1:])


@custom_op("grouped_linear")
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    # (N, K), (E, F, K) -> (N, F); transposed: (N, F), (E, F, K) -> (N, K).
    matrices = weight if transposed else weight.mT
    if _has_kernel(x, weight, matrices.mT):
        return F.grouped_mm(x.contiguous(), matrices, offs=ends)
    return reference.grouped_linear(x, matrices.mT, ends)


@_grouped_linear.register_fake
def _(x, weight, ends, transposed):
    return x.new_empty(len(x), weight.shape[2 if transposed else 1])


@custom_op("grouped_outer")
def _grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    # (N, F), (N, K) -> (E, F, K): the sums of y x^T over the rows of each group.
    if _has_kernel(x, y):
        return F.grouped_mm(y.contiguous().mT, x.contiguous(), offs=ends)
    return reference.grouped_outer(y, x, ends)


@_grouped_outer.register_fake
def _(y, x, ends):
    return x.new_empty(len(ends), y.shape[1], x.shape[1])


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx = _grouped_linear(dy, weight, ends, True) if needs_x else None
    dweight = _grouped_outer(dy, x, ends) if needs_weight else None
    return dx, dweight, None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.tilewright.grouped_linear)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    # Each row is multiplied by exactly one matrix.
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.tilewright.grouped_outer)
def _outer_flops(y_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * y_shape[0] * y_shape[1] * x_shape[1]


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix: x (N, K), weight (E, F, K) -> (N, F).

    Group e consists of rows ends[e - 1] to ends[e]; `ends` (E) is int32 and ascends to N. In bfloat16 with K and F multiples
    of 8, one kernel computes all groups without a synchronization. Otherwise the host reads `ends` back and computes one
    product per group.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or ends.shape != weight.shape[:1]:
        shapes = f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, ends {tuple(ends.shape)}"
        raise ValueError(f"{shapes}: expected (N, K), (E, F, K) and (E)")
    if x.dtype != weight.dtype or ends.dtype != torch.int32:
        raise ValueError(f"x has dtype {x.dtype}, weight {weight.dtype}, ends {ends.dtype}: expected equal dtypes, and int32")
    return _grouped_linear(x, weight, ends, False)
