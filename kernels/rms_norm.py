"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, forward and backward in one pass over memory each.

The pattern that every op's file follows: kernels, launch, registered op, public function.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .device import num_sms
from .dispatch import jit, on_device_of, tl, use_triton


@jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    x_row_stride,
    num_rows,
    width,
    eps: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = (rows < num_rows)[:, None]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride
    y_rows = y_ptr + rows.to(tl.int64)[:, None] * width
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    if ONE_BLOCK:
        mask = row_mask & (columns < width)
        x = tl.load(x_rows + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
        weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(y_rows + columns, (x * rstd[:, None] * weight).to(y_ptr.dtype.element_ty), mask=mask)
    else:
        squares = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            mask = row_mask & (start + columns < width)
            x = tl.load(x_rows + start + columns, mask=mask, other=0.0).to(tl.float32)
            squares += x * x
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / width + eps)
        for start in range(0, width, BLOCK_WIDTH):
            mask = row_mask & (start + columns < width)
            x = tl.load(x_rows + start + columns, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
            tl.store(y_rows + start + columns, (x * rstd[:, None] * weight).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dw_partial_ptr,
    dy_row_stride,
    x_row_stride,
    num_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    # With xhat = x * rstd and g = dy * weight: dx = rstd * (g - xhat * mean(g * xhat)), dw = sum over rows of dy * xhat.
    # Persistent: each program walks over many tiles of rows and writes one partial dw, so that the final sum is short
    # and its order fixed.
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    dw_partial = dw_partial_ptr + program.to(tl.int64) * width
    tile_rows = BLOCK_ROWS * tl.num_programs(0)
    if ONE_BLOCK:
        column_mask = columns < width
        weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        dw = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for start_row in range(program * BLOCK_ROWS, num_rows, tile_rows):
            rows = start_row + tl.arange(0, BLOCK_ROWS)
            mask = (rows < num_rows)[:, None] & column_mask
            wide_rows = rows.to(tl.int64)[:, None]
            x = tl.load(x_ptr + wide_rows * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + wide_rows * dy_row_stride + columns, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
            x_hat = x * rstd
            dw += dy * x_hat
            g = dy * weight
            projection = tl.sum(g * x_hat, axis=1)[:, None] / width
            dx = rstd * (g - x_hat * projection)
            tl.store(dx_ptr + wide_rows * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dw_partial + tl.arange(0, BLOCK_WIDTH), tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK_WIDTH) < width)
    else:
        # One row at a time; the partial dw lives in the program's own row of `dw_partial`, which starts as zeros.
        for row in range(program, num_rows, tile_rows):
            wide_row = tl.cast(row, tl.int64)
            x_row = x_ptr + wide_row * x_row_stride
            dy_row = dy_ptr + wide_row * dy_row_stride
            rstd = tl.load(rstd_ptr + row)
            products = tl.zeros((1, BLOCK_WIDTH), tl.float32)
            for start in range(0, width, BLOCK_WIDTH):
                mask = start + columns < width
                x = tl.load(x_row + start + columns, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_row + start + columns, mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
                products += dy * weight * x * rstd
            projection = tl.sum(products) / width
            for start in range(0, width, BLOCK_WIDTH):
                mask = start + columns < width
                x = tl.load(x_row + start + columns, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dy_row + start + columns, mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(weight_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
                x_hat = x * rstd
                dx = rstd * (dy * weight - x_hat * projection)
                tl.store(dx_ptr + wide_row * width + start + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                dw = tl.load(dw_partial + start + columns, mask=mask, other=0.0)
                tl.store(dw_partial + start + columns, dw + dy * x_hat, mask=mask)


# Elements of a tile: narrow rows share one, so that every warp has 16-byte loads to issue.
TILE = 4096
# The widest row that stays in registers between its statistics and its result; a wider one is read twice. The backward
# pass also holds dy, the weight and the partial dw: at twice this width it spills on sm_80 to sm_100.
MAX_BLOCK_FORWARD = 32768
MAX_BLOCK_BACKWARD = 8192
# Blocks of the looped form need no reuse, so they are small enough for several programs on a multiprocessor.
LOOP_BLOCK = 8192


def launch_config(width: int, max_block: int) -> dict[str, int]:
    """Return the block sizes and warps that ship for rows of `width` elements."""
    one_block = width <= max_block
    block_width = 1 << (width - 1).bit_length() if one_block else LOOP_BLOCK
    block_rows = max(1, TILE // block_width) if one_block else 1
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_WIDTH": block_width,
        "ONE_BLOCK": int(one_block),
        "num_warps": min(max(block_rows * block_width // 1024, 4), 16),
    }


def _as_rows(x: Tensor) -> Tensor:
    # Sliced and expanded rows are fine, the kernels take their stride; elements of a row must be neighbours.
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@torch.library.custom_op("tilewright::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = _as_rows(x)
    num_rows, width = rows.shape
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    config = launch_config(width, MAX_BLOCK_FORWARD)
    if num_rows > 0:
        with on_device_of(x):
            grid = (-(-num_rows // config["BLOCK_ROWS"]),)
            _forward_kernel[grid](rows, weight.contiguous(), y, rstd, rows.stride(0), num_rows, width, eps=eps, **config)
    return y.view(x.shape), rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("tilewright::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows, dy_rows = _as_rows(x), _as_rows(dy)
    num_rows, width = rows.shape
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    config = launch_config(width, MAX_BLOCK_BACKWARD)
    num_programs = min(-(-num_rows // config["BLOCK_ROWS"]), num_sms(x.device) * (4 if width <= TILE else 2))
    # The looped form adds into its partial sums, so those start at zero.
    allocate = torch.empty if config["ONE_BLOCK"] else torch.zeros
    dw_partial = allocate(num_programs, width, dtype=torch.float32, device=x.device)
    if num_rows > 0:
        with on_device_of(x):
            _backward_kernel[(num_programs,)](
                dy_rows, rows, weight.contiguous(), rstd, dx, dw_partial,
                dy_rows.stride(0), rows.stride(0), num_rows, width, **config,
            )  # fmt: skip
    return dx.view(x.shape), dw_partial.sum(dim=0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy: Tensor, _) -> tuple[Tensor, Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    dx, dw = torch.ops.tilewright.rms_norm_backward(dy, x, weight, rstd)
    return dx, dw, None


_rms_norm.register_autograd(_backward, setup_context=_save_for_backward)
# torch.rms_norm is computed in float32 under CUDA autocast; so is ours.
_rms_norm.register_autocast("cuda", torch.float32)


@register_flop_formula([torch.ops.tilewright.rms_norm, torch.ops.tilewright.rms_norm_backward])
def _no_flops(*args, **kwargs) -> int:
    # FlopCounterMode counts matrix multiplications only; registering 0 says that the op was not forgotten.
    return 0


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by `weight` (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D) -> (..., D) in the dtype of `x`; statistics and the gradient of `weight` are summed in float32, in
    a fixed order. float32, float16, bfloat16; x and weight may differ. Any strides of `x`; rows whose elements are not
    neighbours are copied.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is {tuple(x.shape[-1:])}, the last dimension of x")
    if use_triton(x):
        return torch.ops.tilewright.rms_norm(x, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    x, residual (..., D), weight (D) -> (rms_norm(x + residual), x + residual).
    """
    total = x + residual
    return rms_norm(total, weight, eps), total
