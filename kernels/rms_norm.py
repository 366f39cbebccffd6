"""RMSNorm, alone or fused with the sum of the residual stream, forward and backward in one pass over memory each."""

from collections.abc import Iterator
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from . import reference
from .checks import check_choice
from .device import num_sms
from .dispatch import jit, tl, use_triton
from .inspect import KernelCase
from .launch import launch
from .norm import (
    SIZES,
    backward_config,
    check_norm,
    differentiate_rows,
    empty_gradient,
    forward_config,
    normalise_rows,
    result_dtype,
)
from .reference import Casting
from .sharding import row_shardings, sharded_as
from .shared import as_rows, count_no_flops, register_fake


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
    """Write the normalised rows of one tile, their sums with the residual stream, and 1 / rms of each."""
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
    """Write the gradients of a share of all rows, and the part of dw that they contribute."""
    differentiate_rows(
        dy_ptr, d_total_ptr, x_ptr, weight_ptr, None, rstd_ptr, dx_ptr, d_residual_ptr, dw_partial_ptr, None,
        dy_row_stride, d_total_row_stride, x_row_stride, num_rows, width, offset, BLOCK_ROWS, BLOCK_WIDTH, PARTS,
    )  # fmt: skip


@torch.library.custom_op("tilewright::rms_norm", mutates_args=())
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


@register_fake(_rms_norm)
@sharded_as(_rms_norm, _forward_sharding)
def _(x, residual, weight, eps, offset, round_first, y_dtype):
    return (
        torch.empty(x.shape, dtype=y_dtype, device=x.device),
        x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


@torch.library.custom_op("tilewright::rms_norm_backward", mutates_args=())
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
    # `x` is what was normalised. Its gradient is returned once for each dtype that is given, then dw; else empty tensors.
    rows, dy_rows = as_rows(x), as_rows(dy)
    d_total_rows = None if d_total is None else as_rows(d_total)
    num_rows, width = rows.shape
    config, programs = backward_config(width, *(t.element_size() for t in (dy, x, d_total) if t is not None))
    num_programs = min(-(-num_rows // config["BLOCK_ROWS"]), num_sms(x.device) * programs)
    dx, d_residual = empty_gradient(x, dx_dtype), empty_gradient(x, d_residual_dtype)
    dw_partial = None
    if needs_dw:
        # The looped form adds into its partial sums, so those start at zero.
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


@register_fake(_rms_norm_backward)
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
    # A result that nothing uses has no gradient, rather than one of zeros to be read.
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor | None, d_total: Tensor | None, _):
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
    x_dtype, residual_dtype = ctx.dtypes
    rest = (None,) * 4
    if dy is None:
        return None if d_total is None else d_total.to(x_dtype), d_total, None, *rest
    one_tensor = x_dtype == residual_dtype
    dx, d_residual, dw = torch.ops.tilewright.rms_norm_backward(
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


count_no_flops(torch.ops.tilewright.rms_norm, torch.ops.tilewright.rms_norm_backward)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, casting: str, offset: float) -> None:
    check_norm(x, residual, weight=weight)
    if weight is None and offset != 0.0:
        raise ValueError(f"offset is {offset}: without a weight to be added to, allowed is 0.0")
    check_choice("casting", casting, get_args(Casting))


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, casting: Casting = "float32", offset: float = 0.0
) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by offset + weight (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D) -> (..., D) in the dtype of `x`, and in float32 under autocast. float32, float16, bfloat16; x and
    weight may differ; float64 runs the reference. Statistics and the gradient of `weight` are summed in float32, in a fixed
    order. Any strides of `x`; rows whose elements are not neighbours are copied.

    casting="float32" rounds the result once; "llama" rounds also before the weight is applied, as Hugging Face's Llama does.
    Gemma's weights are deviations from one: offset=1.0.
    """
    _check(x, None, weight, casting, offset)
    dtype = result_dtype(x)
    if use_triton(x, weight):
        return torch.ops.tilewright.rms_norm(x, None, weight, eps, offset, casting == "llama", dtype)[0]
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
    """Add a branch to the residual stream and normalise the sum, in one kernel forward and one backward.

    x, residual (..., D), weight (D) -> (rms_norm(x + residual), x + residual). The first has the dtype of `x`, under autocast
    too, where the next product wants it; the sum is computed in float32 and has the dtype of `residual`, which may be wider,
    and is normalised as rounded to it. The options are those of `rms_norm`.
    """
    _check(x, residual, weight, casting, offset)
    if use_triton(x, residual, weight):
        y, total, _ = torch.ops.tilewright.rms_norm(x, residual, weight, eps, offset, casting == "llama", x.dtype)
        return y, total
    return reference.add_rms_norm(x, residual, weight, eps, casting=casting, offset=offset)


def compile_cases() -> Iterator[KernelCase]:
    """Yield both kernels with the launches that ship, alone and with a residual stream."""
    strides = ("x_row_stride", "residual_row_stride", "dy_row_stride", "d_total_row_stride")
    # A head, GPT-2 small and XL, Llama-3 8B and 405B, and the widths on both sides of each change of the launch.
    widths = (64, 768, 1600, 2048, 4096, 8192, 16384, 32768, 65536)
    # x, residual, weight; the third of the five is what autocast trains.
    streams = (
        ("bf16", None, "bf16"),
        ("bf16", "bf16", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("fp32", None, "fp32"),
        ("fp32", "fp32", "fp32"),
    )
    size = {None: 0, "bf16": 2, "fp32": 4}
    for width, (dtype, residual, weight) in product(widths, streams):
        d_residual = None if residual == dtype else residual
        forward = {"x": dtype, "residual": residual, "weight": weight, "y": dtype, "total": residual, "rstd": "fp32"}
        backward = {
            "dy": dtype, "d_total": residual, "x": residual or dtype, "weight": weight, "rstd": "fp32",
            "dx": dtype, "d_residual": d_residual, "dw_partial": "fp32",
        }  # fmt: skip
        backward_sizes = (size[t] for t in (dtype, residual or dtype, residual) if t)
        for kernel, dtypes, config, constants in (
            (
                rms_norm_forward,
                forward,
                forward_config(width, *(size[t] for t in (dtype, residual) if t)),
                {"ROUND_FIRST": False},
            ),
            (rms_norm_backward, backward, backward_config(width, *backward_sizes)[0], {}),
        ):
            num_warps = config.pop("num_warps")
            integers = [name for name in kernel.arg_names if name in (*strides, "num_rows", "width")]
            yield KernelCase(
                name=f"{'rms_norm' if residual is None else f'add_rms_norm on {residual}'} "
                f"{'forward' if kernel is rms_norm_forward else 'backward'} {width} {dtype}",
                kernel=kernel,
                types={f"{name}_ptr": f"*{t}" for name, t in dtypes.items() if t}
                | dict.fromkeys(integers, "i32")
                | ({"eps": "fp32"} if kernel is rms_norm_forward else {}),
                constants={f"{name}_ptr": None for name, t in dtypes.items() if not t} | {"offset": 0.0, **constants, **config},
                num_warps=num_warps,
                aligned=(*strides, "width"),
            )
