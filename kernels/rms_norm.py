"""RMSNorm, alone or fused with the sum of the residual stream, forward and backward in one pass over memory each.

The pattern that every op's file follows: kernels, launch, registered ops, public functions, cases for the compiler.
One pair of kernels serves every form; an argument that a form lacks is None, which Triton compiles away.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .device import num_sms
from .dispatch import jit, tl, use_triton
from .launch import launch
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .reference import Casting
from .registration import count_no_flops, custom_op
from .shared import as_rows


@jit
def _load(ptr, rows, row_stride, columns, mask):
    return tl.load(ptr + rows * row_stride + columns, mask=mask, other=0.0).to(tl.float32)


@jit
def _store(ptr, rows, row_stride, columns, values, mask):
    tl.store(ptr + rows * row_stride + columns, values.to(ptr.dtype.element_ty), mask=mask)


@jit
def _load_input(x_ptr, residual_ptr, total_ptr, rows, x_row_stride, residual_row_stride, width, columns, mask):
    x = _load(x_ptr, rows, x_row_stride, columns, mask)
    if residual_ptr is not None:
        # What is normalised is the sum as stored, so that the backward pass, which reads that, agrees.
        total = (x + _load(residual_ptr, rows, residual_row_stride, columns, mask)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + rows * width + columns, total, mask=mask)
        x = total.to(tl.float32)
    return x


@jit
def _load_scale(weight_ptr, columns, mask, offset: tl.constexpr):
    return tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + offset


@jit
def _store_output(y_ptr, weight_ptr, x_hat, rows, width, columns, mask, offset: tl.constexpr, ROUND_FIRST: tl.constexpr):
    if ROUND_FIRST:
        x_hat = x_hat.to(y_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        x_hat *= _load_scale(weight_ptr, columns, columns < width, offset)
    _store(y_ptr, rows, width, columns, x_hat, mask)


@jit
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
    eps: tl.constexpr,
    offset: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Write the normalised rows of one tile, their sums with the residual stream, and 1 / rms of each."""
    row_numbers = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows = row_numbers.to(tl.int64)[:, None]
    row_mask = rows < num_rows
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    if ONE_BLOCK:
        mask = row_mask & (columns < width)
        x = _load_input(x_ptr, residual_ptr, total_ptr, rows, x_row_stride, residual_row_stride, width, columns, mask)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
        _store_output(y_ptr, weight_ptr, x * rstd[:, None], rows, width, columns, mask, offset, ROUND_FIRST)
    else:
        squares = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            block = start + columns
            mask = row_mask & (block < width)
            x = _load_input(x_ptr, residual_ptr, total_ptr, rows, x_row_stride, residual_row_stride, width, block, mask)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)
        # A thread may read back a total that another one stored.
        tl.debug_barrier()
        for start in range(0, width, BLOCK_WIDTH):
            block = start + columns
            mask = row_mask & (block < width)
            if residual_ptr is not None:
                x = _load(total_ptr, rows, width, block, mask)
            else:
                x = _load(x_ptr, rows, x_row_stride, block, mask)
            _store_output(y_ptr, weight_ptr, x * rstd[:, None], rows, width, block, mask, offset, ROUND_FIRST)
    tl.store(rstd_ptr + row_numbers, rstd, mask=row_numbers < num_rows)


@jit
def _load_normalised(
    dy_ptr, x_ptr, weight_ptr, rstd, rows, dy_row_stride, x_row_stride, width, columns, mask, offset: tl.constexpr
):
    # Returns dy, xhat = x * rstd, and g = dy * weight, the gradient of xhat.
    x_hat = _load(x_ptr, rows, x_row_stride, columns, mask) * rstd
    dy = _load(dy_ptr, rows, dy_row_stride, columns, mask)
    g = dy
    if weight_ptr is not None:
        g *= _load_scale(weight_ptr, columns, columns < width, offset)
    return dy, x_hat, g


@jit
def _store_gradients(dx_ptr, d_residual_ptr, dx, rows, width, columns, mask):
    if dx_ptr is not None:
        _store(dx_ptr, rows, width, columns, dx, mask)
    if d_residual_ptr is not None:
        _store(d_residual_ptr, rows, width, columns, dx, mask)


@jit
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
    ONE_BLOCK: tl.constexpr,
):
    """Write the gradients of a share of all tiles, and the part of dw that they contribute."""
    # With xhat = x * rstd and g = dy * weight: dx = rstd * (g - xhat * mean(g * xhat)), dw = sum over rows of dy * xhat.
    # Persistent: each program walks over many tiles of rows and writes one partial dw, so that the final sum is short
    # and its order fixed.
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    dw = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start_row in range(program * BLOCK_ROWS, num_rows, BLOCK_ROWS * tl.num_programs(0)):
        row_numbers = start_row + tl.arange(0, BLOCK_ROWS)
        rows = row_numbers.to(tl.int64)[:, None]
        row_mask = rows < num_rows
        rstd = tl.load(rstd_ptr + row_numbers, mask=row_numbers < num_rows, other=0.0)[:, None]
        if ONE_BLOCK:
            mask = row_mask & (columns < width)
            dy, x_hat, g = _load_normalised(
                dy_ptr, x_ptr, weight_ptr, rstd, rows, dy_row_stride, x_row_stride, width, columns, mask, offset
            )
            if d_total_ptr is not None:
                d_total = _load(d_total_ptr, rows, d_total_row_stride, columns, mask)
            projection = tl.sum(g * x_hat, axis=1)[:, None] / width
            if dw_partial_ptr is not None:
                dw += dy * x_hat
            dx = rstd * (g - x_hat * projection)
            if d_total_ptr is not None:
                dx += d_total
            _store_gradients(dx_ptr, d_residual_ptr, dx, rows, width, columns, mask)
        else:
            products = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
            for start in range(0, width, BLOCK_WIDTH):
                block = start + columns
                mask = row_mask & (block < width)
                dy, x_hat, g = _load_normalised(
                    dy_ptr, x_ptr, weight_ptr, rstd, rows, dy_row_stride, x_row_stride, width, block, mask, offset
                )
                products += g * x_hat
            projection = tl.sum(products, axis=1)[:, None] / width
            for start in range(0, width, BLOCK_WIDTH):
                block = start + columns
                mask = row_mask & (block < width)
                dy, x_hat, g = _load_normalised(
                    dy_ptr, x_ptr, weight_ptr, rstd, rows, dy_row_stride, x_row_stride, width, block, mask, offset
                )
                dx = rstd * (g - x_hat * projection)
                if d_total_ptr is not None:
                    dx += _load(d_total_ptr, rows, d_total_row_stride, block, mask)
                _store_gradients(dx_ptr, d_residual_ptr, dx, rows, width, block, mask)
                if dw_partial_ptr is not None:
                    # The sum of this form is too wide for registers: it lives in memory, where only this program adds to it.
                    dw_block = dw_partial_ptr + program.to(tl.int64) * width + block
                    dw_sum = tl.load(dw_block, mask=block < width, other=0.0)
                    tl.store(dw_block, dw_sum + tl.sum(dy * x_hat, axis=0)[None, :], mask=block < width)
    if ONE_BLOCK and dw_partial_ptr is not None:
        dw_row = dw_partial_ptr + program.to(tl.int64) * width + columns
        tl.store(dw_row, tl.sum(dw, axis=0)[None, :], mask=columns < width)


# Elements of a tile: narrow rows share one, so that every warp has 16-byte loads to issue.
FORWARD_TILE = 4096
BACKWARD_TILE = 2048
# The widest row, in bytes of its inputs, that stays in registers between its statistics and its result, on sm_80 to sm_100
# without a spill by Triton 3.6 or 3.7; a wider one is read twice. The backward pass also holds the sum that becomes dw.
FORWARD_ROW_BYTES = 64 * 1024
BACKWARD_ROW_BYTES = 96 * 1024
LOOP_BLOCK = 4096
# As many warps live together on a multiprocessor when a thread uses 128 registers; on sm_90 and sm_100 none uses more.
WARPS_PER_SM = 16


def forward_config(width: int, element_bytes: int) -> dict[str, int]:
    """Return the launch that ships for rows of `width` elements, with `element_bytes` read for each."""
    block_width = 1 << (width - 1).bit_length()
    if block_width * element_bytes > FORWARD_ROW_BYTES:
        return {"BLOCK_ROWS": 1, "BLOCK_WIDTH": LOOP_BLOCK, "ONE_BLOCK": 0, "num_warps": 8}
    tile = max(block_width, FORWARD_TILE)
    # A 16-byte load is 8 elements of half precision, 4 of float32 or of two tensors: 4 loads a thread either way.
    num_warps = min(tile // (1024 if element_bytes <= 2 else 512), 32)
    return {"BLOCK_ROWS": tile // block_width, "BLOCK_WIDTH": block_width, "ONE_BLOCK": 1, "num_warps": num_warps}


def backward_config(width: int, element_bytes: int) -> dict[str, int]:
    """Return the launch that ships for rows of `width` elements, with `element_bytes` read for each."""
    block_width = 1 << (width - 1).bit_length()
    if block_width * element_bytes > BACKWARD_ROW_BYTES:
        return {"BLOCK_ROWS": 1, "BLOCK_WIDTH": LOOP_BLOCK, "ONE_BLOCK": 0, "num_warps": 8}
    tile = max(block_width, BACKWARD_TILE)
    # 32 elements a thread need the fewest registers in all; float32 inputs, or several rows, leave room for 16, and both for 8.
    if tile > BACKWARD_TILE and element_bytes <= 6:
        thread_elements = 32
    else:
        thread_elements = 8 if block_width < tile and element_bytes > 8 else 16
    num_warps = min(tile // (32 * thread_elements), 16)
    return {"BLOCK_ROWS": tile // block_width, "BLOCK_WIDTH": block_width, "ONE_BLOCK": 1, "num_warps": num_warps}


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
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows > 0:
        config = forward_config(width, x.element_size() + (0 if residual is None else residual.element_size()))
        launch(
            rms_norm_forward, -(-num_rows // config["BLOCK_ROWS"]),
            rows, residual_rows, None if weight is None else weight.contiguous(),
            y, None if residual is None else total, rstd,
            rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), num_rows, width,
            eps=eps, offset=offset, ROUND_FIRST=round_first, **config,
        )  # fmt: skip
    return y, total, rstd


@_rms_norm.register_fake
def _(x, residual, weight, eps, offset, round_first, y_dtype):
    return (
        torch.empty(x.shape, dtype=y_dtype, device=x.device),
        x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device),
        torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device),
    )


def _empty_gradient(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(0 if dtype is None else like.shape, dtype=dtype, device=like.device)


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
    # `x` is what was normalised. Its gradient is returned once for each dtype that is given, then dw; else empty tensors.
    rows, dy_rows = as_rows(x), as_rows(dy)
    d_total_rows = None if d_total is None else as_rows(d_total)
    num_rows, width = rows.shape
    config = backward_config(width, sum(t.element_size() for t in (dy, x, d_total) if t is not None))
    tiles = -(-num_rows // config["BLOCK_ROWS"])
    num_programs = min(tiles, num_sms(x.device) * WARPS_PER_SM // config["num_warps"])
    dx, d_residual = _empty_gradient(x, dx_dtype), _empty_gradient(x, d_residual_dtype)
    dw_partial = None
    if needs_dw:
        # The looped form adds into its partial sums, so those start at zero.
        allocate = torch.empty if config["ONE_BLOCK"] else torch.zeros
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


@_rms_norm_backward.register_fake
def _(dy, d_total, x, weight, rstd, offset, dx_dtype, d_residual_dtype, needs_dw):
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if needs_dw else x.new_empty(0)
    return _empty_gradient(x, dx_dtype), _empty_gradient(x, d_residual_dtype), dw


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


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, casting: str, offset: float) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: allowed is (..., D) with D of 1 or more")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}: allowed is {tuple(x.shape)}, the shape of x")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: allowed is {tuple(x.shape[-1:])}, the last dimension of x")
    if weight is None and offset != 0.0:
        raise ValueError(f"offset is {offset}: without a weight to be added to, allowed is 0.0")
    if casting not in get_args(Casting):
        raise ValueError(f"casting {casting!r} is unknown: choose 'float32' or 'llama'")
    for name, tensor in (("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: allowed is {x.device}, the device of x")


def _check_dtypes(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise ValueError(
                f"{name} has dtype {tensor.dtype}: the Triton kernels allow {allowed}; backend 'reference' any float"
            )


def _result_dtype(x: Tensor) -> torch.dtype:
    # torch.rms_norm of PyTorch 2.13 gives float32 under CUDA autocast, that of 2.11 does not; ours does, without a copy of x.
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, casting: Casting = "float32", offset: float = 0.0
) -> Tensor:
    """Scale each row of `x` to unit root mean square, then by offset + weight (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D) -> (..., D) in the dtype of `x`, and in float32 under autocast. float32, float16, bfloat16; x and
    weight may differ. Statistics and the gradient of `weight` are summed in float32, in a fixed order. Any strides of `x`;
    rows whose elements are not neighbours are copied.

    casting="float32" rounds the result once; "llama" rounds also before the weight is applied, as Hugging Face's Llama does.
    Gemma's weights are deviations from one: offset=1.0.
    """
    _check(x, None, weight, casting, offset)
    dtype = _result_dtype(x)
    if use_triton(x):
        _check_dtypes(x=x, weight=weight)
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
    """Add a branch to the residual stream and normalise the sum, in one kernel forward and one backward.

    x, residual (..., D), weight (D) -> (rms_norm(x + residual), x + residual). The first has the dtype of `x`, under autocast
    too, where the next product wants it; the sum is computed in float32 and has the dtype of `residual`, which may be wider,
    and is normalised as rounded to it. The options are those of `rms_norm`.
    """
    _check(x, residual, weight, casting, offset)
    if use_triton(x):
        _check_dtypes(x=x, residual=residual, weight=weight)
        y, total, _ = _rms_norm(x, residual, weight, eps, offset, casting == "llama", x.dtype)
        return y, total
    return reference.add_rms_norm(x, residual, weight, eps, casting=casting, offset=offset)


def _costs(itemsize: int, rows: int, width: int, weight_itemsize: int | None = None) -> Costs:
    # Read x and write y; read x and dy, write dx; weights and float32 statistics besides.
    elements, weight = rows * width, width * (weight_itemsize or itemsize)
    forward = Cost(2 * elements * itemsize + weight + 4 * rows, 4 * elements)
    return Costs.of(forward, Cost(3 * elements * itemsize + 2 * weight + 4 * rows, 11 * elements))


def _add_costs(
    itemsize: int, rows: int, width: int, weight_itemsize: int | None = None, residual_itemsize: int | None = None
) -> Costs:
    # One more stream in and out, and one gradient for both inputs, written twice where x and the residual differ in dtype.
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
    # `stream_dtype` is that of the residual stream and of the weight.
    stream_dtype = stream_dtype or dtype
    x, residual = draw(device, dtype, rows, width), draw(device, stream_dtype, rows, width)
    return Arguments((x, residual, draw(device, stream_dtype, width)), {})


# Fewer rows of the widest: in float64 all of them would take more memory than there is.
_SHAPES = [{"rows": 2**16, "width": width} for width in (4096, 768, 1024, 1280, 1600, 2048, 8192)]
_SHAPES += [{"rows": 2**29 // width, "width": width} for width in (16384, 32768)]
# A head, GPT-2 small and XL, Llama-3 8B and 405B, and the widths on both sides of each change of the launch.
_WIDTHS = (64, 768, 1600, 2048, 4096, 8192, 16384, 32768, 65536)
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
        compiled=tuple(grid(rows=(8192,), width=_WIDTHS, dtype=(_HALF, _FULL))),
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
        # A stream in float32 beside bfloat16 is what autocast trains.
        compiled=(
            *grid(rows=(8192,), width=_WIDTHS, dtype=(_HALF,), stream_dtype=(_HALF, _FULL)),
            *grid(rows=(8192,), width=_WIDTHS, dtype=(_FULL,), stream_dtype=(_FULL,)),
        ),
        over="width",
        huge={"rows": 2**18 + 1, "width": 8192},
    )
)
