"""SwiGLU: y = silu(gate) * up, forward and backward in one pass over memory each, split or packed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import jit, tl, use_triton
from .launch import launch
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .registration import count_no_flops, custom_op
from .shared import as_rows


@jit
def _tile(num_rows, width, num_column_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    # All programs stand in the grid's first dimension, the only one that takes more than 65535; this division is the
    # program's, not the element's.
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = (program % num_column_blocks).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    return rows, columns, (rows < num_rows) & (columns < width)


@jit
def swiglu_forward(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_row_stride,
    up_row_stride,
    y_row_stride,
    num_rows,
    width,
    num_column_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Write one tile of the result."""
    rows, columns, mask = _tile(num_rows, width, num_column_blocks, BLOCK_ROWS, BLOCK_WIDTH)
    gate = tl.load(gate_ptr + rows * gate_row_stride + columns, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + columns, mask=mask).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + rows * y_row_stride + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def swiglu_backward(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    num_rows,
    width,
    num_column_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Write one tile of both gradients."""
    # With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
    rows, columns, mask = _tile(num_rows, width, num_column_blocks, BLOCK_ROWS, BLOCK_WIDTH)
    dy = tl.load(dy_ptr + rows * dy_row_stride + columns, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_row_stride + columns, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + columns, mask=mask).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    scaled = dy * sigmoid
    dgate = scaled * up * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + rows * dgate_row_stride + columns, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + rows * dup_row_stride + columns, (scaled * gate).to(dup_ptr.dtype.element_ty), mask=mask)


# Bytes that a program and a thread read of each input: two 16-byte loads a thread, and few enough registers that the
# multiprocessor is full of warps whose loads are under way.
PROGRAM_BYTES = 8192
THREAD_BYTES = 32


def launch_config(num_rows: int, width: int, element_size: int) -> dict[str, int]:
    """Return the block sizes and warps that ship for `num_rows` rows of `width` elements, of `element_size` bytes each."""
    tile = PROGRAM_BYTES // element_size
    if width < 1024:
        block_width = 1 << (width - 1).bit_length()
    else:
        # Widths such as 14336 = 7 * 2048 fill narrower blocks better; no row segment is under 2 KB.
        fitting = (block for block in (tile, tile // 2) if -width % block <= width // 16)
        block_width = next(fitting, 1024)
    block_rows = min(tile // block_width, 1 << (num_rows - 1).bit_length())
    num_warps = max(block_rows * block_width * element_size // (32 * THREAD_BYTES), 1)
    return {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width, "num_warps": num_warps}


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    width = gate.shape[-1] // 2
    return gate[..., :width], gate[..., width:]


def _launch(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    first = inputs[0]
    if first.numel() == 0:
        return
    if all(x.is_contiguous() for x in (*inputs, *outputs)):
        # One long row: 16-byte loads whatever the width.
        rows = [x.view(1, -1) for x in (*inputs, *outputs)]
    else:
        rows = [*map(as_rows, inputs), *(y.view(-1, y.shape[-1]) for y in outputs)]
    num_rows, width = rows[0].shape
    config = launch_config(num_rows, width, max(x.element_size() for x in rows))
    num_column_blocks = -(-width // config["BLOCK_WIDTH"])
    num_programs = -(-num_rows // config["BLOCK_ROWS"]) * num_column_blocks
    launch(kernel, num_programs, *rows, *(x.stride(0) for x in rows), num_rows, width, num_column_blocks, **config)


@custom_op("swiglu")
def _swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    y = _empty_result(gate, up)
    _launch(swiglu_forward, _halves(gate, up), (y,))
    return y


@_swiglu.register_fake
def _empty_result(gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None:
        return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@custom_op("swiglu_backward")
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    gradients = _empty_gradients(dy, gate, up)
    # Both halves of a packed gradient are views of the one tensor that is returned.
    _launch(swiglu_backward, (dy, *_halves(gate, up)), _halves(gradients[0], gradients[1] if up is not None else None))
    return gradients


@_swiglu_backward.register_fake
def _empty_gradients(dy: Tensor, gate: Tensor, up: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (gate, up) if x is not None]


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    gradients = _swiglu_backward(dy, *ctx.saved_tensors)
    return gradients[0], gradients[1] if len(gradients) == 2 else None


# No autocast rule: silu and mul have none in PyTorch either, they compute in the dtypes that they are given.
_swiglu.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(_swiglu, _swiglu_backward)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check(gate: Tensor, up: Tensor | None) -> None:
    for name, x in (("gate", gate), ("up", up)):
        if x is not None and x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: allowed are {', '.join(map(str, DTYPES))}")
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"gate has shape {tuple(gate.shape)}: without up, its last dimension must be even, gate beside up")
        return
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {tuple(up.shape)}: allowed is {tuple(gate.shape)}, the shape of gate")
    if up.device != gate.device:
        raise ValueError(f"up is on {up.device}: allowed is {gate.device}, the device of gate")


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, eq. 6), elementwise, computed in float32 and rounded once.

    gate, up (..., F) -> (..., F); with `up` omitted, `gate` is packed (..., 2F), gate before up, and so is its gradient,
    which the backward kernel writes in place of a concatenation. float32, float16, bfloat16; where gate and up differ, the
    result has the dtype that PyTorch promotes both to. float64 runs the reference. Only the inputs are kept for the backward
    pass. Slices and repeated rows are read in place; rows that no one stride reaches, or whose elements are no neighbours,
    are copied.
    """
    _check(gate, up)
    is_double = torch.float64 in (gate.dtype, None if up is None else up.dtype)
    if use_triton(gate) and not is_double:
        return _swiglu(gate, up)
    return reference.swiglu(gate, up)


def _costs(itemsize: int, rows: int, width: int, packed: bool = False) -> Costs:
    # Read gate and up, write one; read gate, up and dy, write two. `width` is F.
    elements = rows * width
    return Costs.of(Cost(3 * elements * itemsize, 5 * elements), Cost(5 * elements * itemsize, 12 * elements))


def _arguments(device: torch.device, dtype: torch.dtype, rows: int, width: int, packed: bool = False) -> Arguments:
    if packed:
        return Arguments((draw(device, dtype, rows, 2 * width),), {})
    return Arguments((draw(device, dtype, rows, width), draw(device, dtype, rows, width)), {})


record(
    Op(
        function=swiglu,
        reference=reference.swiglu,
        kernels=(swiglu_forward, swiglu_backward),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple({"rows": 2**16, "width": width} for width in (14336, 3072, 6400)),
        examples=({"rows": 6, "width": 96},),
        # GPT-2 small and XL, Llama 3 8B.
        compiled=tuple(
            grid(rows=(8192,), width=(3072, 6400, 14336), packed=(False, True), dtype=(torch.bfloat16, torch.float32))
        ),
        baseline=lambda gate, up: F.silu(gate) * up,
        over="width",
        huge={"rows": 2**17 + 1, "width": 8192, "packed": True},
    )
)
