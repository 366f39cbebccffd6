"""LayerNorm, with one pass over memory forward and one backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .device import num_sms
from .dispatch import jit, tl, use_triton
from .launch import launch
from .norm import (
    COMPILED_WIDTHS,
    SIZES,
    backward_config,
    check_norm,
    differentiate_rows,
    empty_gradient,
    forward_config,
    normalise_rows,
    result_dtype,
)
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .registration import count_no_flops, custom_op
from .sharding import row_shardings, sharded_as
from .shared import as_rows


@jit(do_not_specialize=SIZES)
def layer_norm_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride,
    num_rows,
    width,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the normalized rows of one tile, with the mean and 1 / standard deviation of each row."""
    normalise_rows(
        x_ptr, None, weight_ptr, bias_ptr, y_ptr, None, mean_ptr, rstd_ptr, x_row_stride, 0,
        num_rows, width, eps, 0.0, False, BLOCK_ROWS, BLOCK_WIDTH, PARTS,
    )  # fmt: skip


@jit(do_not_specialize=SIZES)
def layer_norm_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_partial_ptr,
    db_partial_ptr,
    dy_row_stride,
    x_row_stride,
    num_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write dx for the rows of this program, and their partial sums of dw and db."""
    differentiate_rows(
        dy_ptr, None, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, None, dw_partial_ptr, db_partial_ptr,
        dy_row_stride, 0, x_row_stride, num_rows, width, 0.0, BLOCK_ROWS, BLOCK_WIDTH, PARTS,
    )  # fmt: skip


@custom_op("layer_norm")
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    # Returns y, and the mean and 1 / standard deviation of each row.
    rows = as_rows(x)
    num_rows, width = rows.shape
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if num_rows > 0:
        config = forward_config(width, x.element_size())
        launch(
            layer_norm_forward, -(-num_rows // config["BLOCK_ROWS"]),
            rows, *(None if v is None else v.contiguous() for v in (weight, bias)), y, mean, rstd,
            rows.stride(0), num_rows, width, eps, **config,
        )  # fmt: skip
    return y, mean, rstd


def _forward_sharding(x, weight, bias, *_):
    vectors = (None if vector is None else "whole" for vector in (weight, bias))
    return row_shardings(len(x.shape) - 1, ("rows",) * 3, ("rows", *vectors, None, None))


@_layer_norm.register_fake
@sharded_as(_layer_norm, _forward_sharding)
def _(x, weight, bias, eps, y_dtype):
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    return y, *(torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))


@custom_op("layer_norm_backward")
def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dw: bool,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Returns dx, dw and db; an empty tensor for a gradient that is not needed.
    rows, dy_rows = as_rows(x), as_rows(dy)
    num_rows, width = rows.shape
    config, programs = backward_config(width, dy.element_size(), x.element_size(), num_sums=2)
    num_programs = min(-(-num_rows // config["BLOCK_ROWS"]), num_sms(x.device) * programs)
    dx = empty_gradient(x, x.dtype if needs_dx else None)
    # The looped form adds to its partial sums, so they start at zero.
    allocate = torch.empty if config["PARTS"] else torch.zeros
    dw_partial, db_partial = (
        allocate(num_programs, width, dtype=torch.float32, device=x.device) if needed else None
        for needed in (needs_dw, db_dtype is not None)
    )
    if num_rows > 0:
        launch(
            layer_norm_backward, num_programs,
            dy_rows, rows, None if weight is None else weight.contiguous(), mean, rstd,
            dx if needs_dx else None, dw_partial, db_partial,
            dy_rows.stride(0), rows.stride(0), num_rows, width, **config,
        )  # fmt: skip
    dw = x.new_empty(0) if weight is None or dw_partial is None else dw_partial.sum(dim=0).to(weight.dtype)
    return dx, dw, x.new_empty(0) if db_partial is None else db_partial.sum(dim=0).to(db_dtype)


def _backward_sharding(dy, x, weight, mean, rstd, needs_dx, needs_dw, db_dtype):
    outputs = "rows" if needs_dx else "whole", *("sum" if needed else "whole" for needed in (needs_dw, db_dtype is not None))
    inputs = "rows", "rows", None if weight is None else "whole", "rows", "rows", *(None,) * 3
    return row_shardings(len(x.shape) - 1, outputs, inputs)


@_layer_norm_backward.register_fake
@sharded_as(_layer_norm_backward, _backward_sharding)
def _(dy, x, weight, mean, rstd, needs_dx, needs_dw, db_dtype):
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs_dw else x.new_empty(0)
    db = x.new_empty(0) if db_dtype is None else torch.empty(x.shape[-1:], dtype=db_dtype, device=x.device)
    return empty_gradient(x, x.dtype if needs_dx else None), dw, db


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, *_):
    if dy is None:
        return (None,) * 5
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dw, db = _layer_norm_backward(dy, *ctx.saved_tensors, needs_x, needs_weight, ctx.bias_dtype if needs_bias else None)
    return dx if needs_x else None, dw if needs_weight else None, db if needs_bias else None, None, None


_layer_norm.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(_layer_norm, _layer_norm_backward)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Shift each row of `x` to mean 0 and scale it to variance 1, then by `weight`, then add `bias` (Ba et al. 2016, eq. 4).

    x (..., D), weight (D), bias (D) -> (..., D) in the dtype of `x`, or float32 under CUDA autocast. Supports float32, float16
    and bfloat16; the inputs may differ in dtype. float64 runs the reference. Statistics and the gradients of weight and bias
    are summed in float32, in a fixed order. The variance, over D, is computed from the deviations, so that a large mean costs
    no accuracy. `x` may have any strides; rows are copied if their elements are not contiguous.
    """
    check_norm(x, eps, weight=weight, bias=bias)
    dtype = result_dtype(x)
    if use_triton(x, weight, bias):
        return _layer_norm(x, weight, bias, eps, dtype)[0]
    return reference.layer_norm(x.to(dtype), weight, bias, eps)


def _costs(itemsize: int, rows: int, width: int, bias: bool = True) -> Costs:
    # Forward: read x, write y. Backward: read x and dy, write dx. Plus weight, bias and float32 statistics.
    elements, vectors = rows * width, (1 + bias) * width * itemsize
    forward = Cost(2 * elements * itemsize + vectors + 8 * rows, 6 * elements)
    return Costs.of(forward, Cost(3 * elements * itemsize + width * itemsize + vectors + 8 * rows, 14 * elements))


def _arguments(device: torch.device, dtype: torch.dtype, rows: int, width: int, bias: bool = True) -> Arguments:
    vectors = [draw(device, dtype, width) for _ in range(1 + bias)]
    return Arguments((draw(device, dtype, rows, width), *vectors), {})


record(
    Op(
        function=layer_norm,
        reference=reference.layer_norm,
        kernels=(layer_norm_forward, layer_norm_backward),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple({"rows": 2**16, "width": width} for width in (4096, 768, 1600, 8192)),
        examples=({"rows": 6, "width": 96}, {"rows": 5, "width": 24, "bias": False}),
        compiled=tuple(grid(rows=(8192,), width=COMPILED_WIDTHS, dtype=(torch.bfloat16, torch.float32))),
        baseline=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
        over="width",
        huge={"rows": 2**18 + 1, "width": 8192},
    )
)
