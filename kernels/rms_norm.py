"""RMSNorm, alone or fused with the residual sum, with one pass over memory forward and one backward."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import check_choice, check_number
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
from .reference import Casting
from .registration import count_no_flops, custom_op
from .sharding import row_shardings, sharded_as
from .shared import as_rows


@jit(do_not_specialize=SIZES)
def rms_norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    x_row_stride,
    residual_row_stride,
    num_rows,
    width,
    eps,
    offset: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the normalized rows of one tile, their sums with the residual stream, and 1 / rms of each row."""
    normalise_rows(
        x_ptr, residual_ptr, weight_ptr, None, y_ptr, total_ptr, None, rstd_ptr, x_row_stride, residual_row_stride,
        num_rows, width, eps, offset, ROUND_FIRST, BLOCK_ROWS, BLOCK_WIDTH, PARTS,
    )  # fmt: skip


@jit(do_not_specialize=SIZES)
def rms_norm_backward(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    d_residual_ptr,
    dw_partial_ptr,
    dy_row_stride,
    d_total_row_stride,
    x_row_stride,
    num_rows,
    width,
    offset: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write dx for the rows of this program, and their partial sum of dw."""
    differentiate_rows(
        dy_ptr, d_total_ptr, x_ptr, weight_ptr, None, rstd_ptr, dx_ptr, d_residual_ptr, dw_partial_ptr, None,
        dy_row_stride, d_total_row_stride, x_row_stride, num_rows, width, offset, BLOCK_ROWS, BLOCK_WIDTH, PARTS,
    )  # fmt: skip


@custom_op("rms_norm")
def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    round_first: bool,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    # Returns y, x + residual (empty without a residual) and 1 / rms of each row.
    rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    num_rows, width = rows.shape
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if num_rows > 0:
        config = forward_config(width, *(t.element_size() for t in (x, residual) if t is not None))
        launch(
            rms_norm_forward, -(-num_rows // config["BLOCK_ROWS"]),
            rows, residual_rows, None if weight is None else weight.contiguous(),
            y, None if residual is None else total, rstd,
            rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), num_rows, width, eps,
            offset=offset, ROUND_FIRST=round_first, **config,
        )  # fmt: skip
    return y, total, rstd


def _forward_sharding(x, residual, weight, *_):
    residual, weight = None if residual is None else "rows", None if weight is None else "whole"
    return row_shardings(len(x.shape) - 1, ("rows", residual or "whole", "rows"), ("rows", residual, weight, *(None,) * 4))


@_rms_norm.register_fake
@sharded_as(_rms_norm, _forward_sharding)
def _(x, residual, weight, eps, offset, round_first, y_dtype):
    return (
        torch.empty(x.shape, dtype=y_dtype, device=x.device),
        x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


@custom_op("rms_norm_backward")
def _rms_norm_backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    dx_dtype: torch.dtype | None,
    d_residual_dtype: torch.dtype | None,
    needs_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # `x` is the normalized input. Returns its gradient in each given dtype, and dw; an empty tensor for None.
    rows, dy_rows = as_rows(x), as_rows(dy)
    d_total_rows = None if d_total is None else as_rows(d_total)
    num_rows, width = rows.shape
    config, programs = backward_config(width, *(t.element_size() for t in (dy, x, d_total) if t is not None))
    num_programs = min(-(-num_rows // config["BLOCK_ROWS"]), num_sms(x.device) * programs)
    dx, d_residual = empty_gradient(x, dx_dtype), empty_gradient(x, d_residual_dtype)
    dw_partial = None
    if needs_dw:
        # The looped form adds to its partial sums, so they start at zero.
        allocate = torch.empty if config["PARTS"] else torch.zeros
        dw_partial = allocate(num_programs, width, dtype=torch.float32, device=x.device)
    if num_rows > 0:
        launch(
            rms_norm_backward, num_programs,
            dy_rows, d_total_rows, rows, None if weight is None else weight.contiguous(), rstd,
            None if dx_dtype is None else dx, None if d_residual_dtype is None else d_residual, dw_partial,
            dy_rows.stride(0), 0 if d_total_rows is None else d_total_rows.stride(0), rows.stride(0),
            num_rows, width, offset=offset, **config,
        )  # fmt: skip
    if weight is None or dw_partial is None:
        return dx, d_residual, x.new_empty(0)
    return dx, d_residual, dw_partial.sum(dim=0).to(weight.dtype)


def _backward_sharding(dy, d_total, x, weight, rstd, offset, dx_dtype, d_residual_dtype, needs_dw):
    dx, d_residual = ("whole" if dtype is None else "rows" for dtype in (dx_dtype, d_residual_dtype))
    d_total, weight = None if d_total is None else "rows", None if weight is None else "whole"
    outputs = dx, d_residual, "sum" if needs_dw else "whole"
    return row_shardings(len(x.shape) - 1, outputs, ("rows", d_total, "rows", weight, "rows", *(None,) * 4))


@_rms_norm_backward.register_fake
@sharded_as(_rms_norm_backward, _backward_sharding)
def _(dy, d_total, x, weight, rstd, offset, dx_dtype, d_residual_dtype, needs_dw):
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs_dw else x.new_empty(0)
    return empty_gradient(x, dx_dtype), empty_gradient(x, d_residual_dtype), dw


def _save_for_backward(ctx, inputs, output) -> None:
    x, residual, weight, _, ctx.offset, _, _ = inputs
    _, total, rstd = output
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.mark_non_differentiable(rstd, *([total] if residual is None else []))
    # An unused result has gradient None, so that no zeros are read.
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, d_total: Tensor | None, _):
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
    x_dtype, residual_dtype = ctx.dtypes
    rest = (None,) * 4
    if dy is None:
        return None if d_total is None else d_total.to(x_dtype), d_total, None, *rest
    one_tensor = x_dtype == residual_dtype
    dx, d_residual, dw = _rms_norm_backward(
        dy,
        d_total,
        x,
        weight,
        rstd,
        ctx.offset,
        x_dtype if needs_x or (needs_residual and one_tensor) else None,
        residual_dtype if needs_residual and not one_tensor else None,
        needs_weight,
    )
    if one_tensor:
        d_residual = dx
    return dx if needs_x else None, d_residual if needs_residual else None, dw if needs_weight else None, *rest


_rms_norm.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(_rms_norm, _rms_norm_backward)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, casting: str, offset: float) -> None:
    check_norm(x, eps, residual, weight=weight)
    check_number("offset", offset)
    if weight is None and offset != 0.0:
        raise ValueError(f"offset is {offset}: expected 0.0 without a weight")
    check_choice("casting", casting, get_args(Casting))


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, casting: Casting = "float32", offset: float = 0.0
) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by offset + weight (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D) -> (..., D) in the dtype of `x`, or float32 under CUDA autocast. Supports float32, float16 and
    bfloat16; x and weight may differ. float64 runs the reference. Statistics and the gradient of `weight` are summed in
    float32, in a fixed order. `x` may have any strides; rows are copied if their elements are not contiguous.

    casting="float32" rounds the result once. "llama" also rounds before the weight is applied, as Hugging Face's Llama does.
    Gemma stores weights as deviations from one: use offset=1.0.
    """
    _check(x, None, weight, eps, casting, offset)
    dtype = result_dtype(x)
    if use_triton(x, weight):
        return _rms_norm(x, None, weight, eps, offset, casting == "llama", dtype)[0]
    return reference.rms_norm(x.to(dtype), weight, eps, casting=casting, offset=offset)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    casting: Casting = "float32",
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalize the sum, with one kernel forward and one backward.

    x, residual (..., D), weight (D) -> (rms_norm(x + residual), x + residual). The first result has the dtype of
    `x`, also under autocast, because the next product needs it. The sum is computed in float32, rounded to the dtype of
    `residual`, which may be wider, and then normalized. Options are the same as for `rms_norm`.
    """
    _check(x, residual, weight, eps, casting, offset)
    if use_triton(x, residual, weight):
        y, total, _ = _rms_norm(x, residual, weight, eps, offset, casting == "llama", x.dtype)
        return y, total
    return reference.add_rms_norm(x, residual, weight, eps, casting=casting, offset=offset)


def _costs(itemsize: int, rows: int, width: int, weight_itemsize: int | None = None) -> Costs:
    # Forward: read x, write y. Backward: read x and dy, write dx. Plus weight and float32 statistics.
    elements, weight = rows * width, width * (weight_itemsize or itemsize)
    forward = Cost(2 * elements * itemsize + weight + 4 * rows, 4 * elements)
    return Costs.of(forward, Cost(3 * elements * itemsize + 2 * weight + 4 * rows, 11 * elements))


def _add_costs(
    itemsize: int, rows: int, width: int, weight_itemsize: int | None = None, residual_itemsize: int | None = None
) -> Costs:
    # One more input and output. The single gradient is written twice if x and the residual differ in dtype.
    elements, weight = rows * width, width * (weight_itemsize or itemsize)
    residual = elements * (residual_itemsize or itemsize)
    forward = Cost(2 * elements * itemsize + 2 * residual + weight + 4 * rows, 5 * elements)
    written = residual if residual_itemsize in (None, itemsize) else residual + elements * itemsize
    backward = Cost(elements * itemsize + 2 * residual + written + 2 * weight + 4 * rows, 12 * elements)
    return Costs.of(forward, backward)


def _arguments(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, weight_dtype: torch.dtype | None = None
) -> Arguments:
    return Arguments((draw(device, dtype, rows, width), draw(device, weight_dtype or dtype, width)), {})


def _add_arguments(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, stream_dtype: torch.dtype | None = None
) -> Arguments:
    # `stream_dtype` is the dtype of the residual stream and the weight.
    stream_dtype = stream_dtype or dtype
    x, residual = draw(device, dtype, rows, width), draw(device, stream_dtype, rows, width)
    return Arguments((x, residual, draw(device, stream_dtype, width)), {})


# The widest shapes have fewer rows, so that the float64 oracle fits in memory.
_SHAPES = [{"rows": 2**16, "width": width} for width in (4096, 768, 1024, 1280, 1600, 2048, 8192)]
_SHAPES += [{"rows": 2**29 // width, "width": width} for width in (16384, 32768)]
_HALF, _FULL = torch.bfloat16, torch.float32

record(
    Op(
        function=rms_norm,
        reference=reference.rms_norm,
        kernels=(rms_norm_forward, rms_norm_backward),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple(_SHAPES),
        examples=({"rows": 6, "width": 96},),
        compiled=tuple(grid(rows=(8192,), width=COMPILED_WIDTHS, dtype=(_HALF, _FULL))),
        baseline=lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
        over="width",
        huge={"rows": 2**18 + 1, "width": 8192},
    )
)
record(
    Op(
        function=add_rms_norm,
        reference=reference.add_rms_norm,
        kernels=(rms_norm_forward, rms_norm_backward),
        arguments=_add_arguments,
        cost=_add_costs,
        shapes=tuple(shape for shape in _SHAPES if shape["width"] in (4096, 1600, 8192)),
        examples=({"rows": 6, "width": 96},),
        # Autocast trains with a float32 residual stream and bfloat16 branches.
        compiled=(
            *grid(rows=(8192,), width=COMPILED_WIDTHS, dtype=(_HALF,), stream_dtype=(_HALF, _FULL)),
            *grid(rows=(8192,), width=COMPILED_WIDTHS, dtype=(_FULL,), stream_dtype=(_FULL,)),
        ),
        over="width",
        huge={"rows": 2**18 + 1, "width": 8192},
    )
)
