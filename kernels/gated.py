"""Shared code of the gated linear units, which differ only in the activation: tiles, launches, packed halves and checks."""

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATING, check_device, check_dtype
from .dispatch import jit, tl
from .launch import launch
from .op import Arguments, Cost, Costs, draw, grid
from .sharding import row_shardings
from .shared import as_rows

# Not specialized: they change from call to call, and their divisibility does not affect the width of loads.
SIZES = ("num_rows", "num_column_blocks")


@jit
def gated_tile(num_rows, width, num_column_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Return the rows, the columns and the mask of this program's tile."""
    # Programs use only the first grid dimension, because the others are limited to 65535. The division costs one
    # instruction a program, not one an element.
    program = tl.program_id(0)
    rows = (program // num_column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = (program % num_column_blocks).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    return rows, columns, (rows < num_rows) & (columns < width)


@jit
def load_tile(ptr, rows, row_stride, columns, mask):
    """Return a tile in float32."""
    return tl.load(ptr + rows * row_stride + columns, mask=mask).to(tl.float32)


@jit
def store_tile(ptr, rows, row_stride, columns, values, mask):
    """Store a tile, rounded to the dtype of the tensor."""
    tl.store(ptr + rows * row_stride + columns, values.to(ptr.dtype.element_ty), mask=mask)


# Bytes that a program and a thread read from each input: two 16-byte loads a thread, and few enough registers for full
# occupancy, so that enough loads are in flight.
PROGRAM_BYTES = 8192
THREAD_BYTES = 32


def gated_launch_config(num_rows: int, width: int, element_size: int) -> dict[str, int]:
    """Return the block sizes and warps for `num_rows` rows of `width` elements of `element_size` bytes."""
    tile = PROGRAM_BYTES // element_size
    if width < 1024:
        block_width = 1 << (width - 1).bit_length()
    else:
        # Narrower blocks waste fewer lanes at widths such as 14336 = 7 * 2048; a row segment has 2 KB or more.
        fitting = (block for block in (tile, tile // 2) if -width % block <= width // 16)
        block_width = next(fitting, 1024)
    block_rows = min(tile // block_width, 1 << (num_rows - 1).bit_length())
    num_warps = max(block_rows * block_width * element_size // (32 * THREAD_BYTES), 1)
    return {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width, "num_warps": num_warps}


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up; for a packed `gate`, its two halves as views."""
    if up is not None:
        return gate, up
    width = gate.shape[-1] // 2
    return gate[..., :width], gate[..., width:]


def launch_gated(kernel: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...], **constants: Any) -> None:
    """Launch `kernel(*inputs, *outputs, *their row strides, num_rows, width, num_column_blocks)`; an output may be None."""
    present = [x for x in (*inputs, *outputs) if x is not None]
    if present[0].numel() == 0:
        return
    if all(x.is_contiguous() for x in present):
        # Treat contiguous tensors as one long row, which allows 16-byte loads at any width.
        rows = [None if x is None else x.view(1, -1) for x in (*inputs, *outputs)]
    else:
        rows = [*map(as_rows, inputs), *(None if y is None else y.view(-1, y.shape[-1]) for y in outputs)]
    first = rows[0]
    assert first is not None
    num_rows, width = first.shape
    config = gated_launch_config(num_rows, width, max(x.element_size() for x in present))
    num_column_blocks = -(-width // config["BLOCK_WIDTH"])
    num_programs = -(-num_rows // config["BLOCK_ROWS"]) * num_column_blocks
    strides = (0 if x is None else x.stride(0) for x in rows)
    launch(kernel, num_programs, *rows, *strides, num_rows, width, num_column_blocks, **constants, **config)


def empty_result(gate: Tensor, up: Tensor | None) -> Tensor:
    """Allocate the result: (..., F) in the dtype that PyTorch promotes gate and up to."""
    if up is None:
        return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def empty_gradients(gate: Tensor, up: Tensor | None, needs_gate: bool, needs_up: bool) -> tuple[Tensor, Tensor]:
    """Allocate the gradients of gate, packed as gate is, and of up; an empty tensor for a gradient that is not needed."""
    up = gate if up is None else up
    return gate.new_empty(gate.shape if needs_gate else 0), up.new_empty(up.shape if needs_up else 0)


def needed_gradients(gradients: tuple[Tensor, Tensor], is_packed: bool, needs_gate: bool, needs_up: bool) -> Any:
    """Return the outputs of the backward kernel: the gradients of gate and up, None for one that is not needed."""
    if is_packed:
        # Views of the single packed gradient.
        return halves(gradients[0], None)
    return gradients[0] if needs_gate else None, gradients[1] if needs_up else None


def forward_sharding(gate: Any, up: Any, *options: Any) -> Any:
    """Return the sharding choices of a forward op: elementwise, except that the halves of a packed row stay together."""
    num_dims = len(gate.shape) - (up is None)
    return row_shardings(num_dims, ("rows",), ("rows", None if up is None else "rows", *(None for _ in options)))


def backward_sharding(dy: Any, gate: Any, up: Any, *options: Any) -> Any:
    """Return the sharding choices of a backward op; its last two options are flags for the gradients that are needed."""
    num_dims = len(gate.shape) - (up is None)
    outputs = ["rows" if needed else "whole" for needed in options[-2:]]
    return row_shardings(num_dims, outputs, ("rows", "rows", None if up is None else "rows", *(None for _ in options)))


def check_gated(gate: Tensor, up: Tensor | None) -> None:
    """Raise unless gate and up have one shape and device, or gate is packed."""
    check_dtype(FLOATING, gate=gate, up=up)
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(f"gate has shape {tuple(gate.shape)}: expected an even last dimension without up, gate and up packed")
    if gate.dim() > 0 and gate.shape[-1] == 0:
        raise ValueError(f"gate has shape {tuple(gate.shape)}: expected a last dimension of 1 or more")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up has shape {tuple(up.shape)}: expected {tuple(gate.shape)}, the shape of gate")
    check_device(gate=gate, up=up)


def gated_costs(
    forward_flops: int, backward_flops: int, itemsize: int, rows: int, width: int, packed: bool = False, **_: Any
) -> Costs:
    """Return the costs of an op by its FLOPs per element. Forward: read 2, write 1; backward: read 3, write 2. `width` is F."""
    elements = rows * width
    forward = Cost(3 * elements * itemsize, forward_flops * elements)
    return Costs.of(forward, Cost(5 * elements * itemsize, backward_flops * elements))


def gated_arguments(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, packed: bool = False, **options: Any
) -> Arguments:
    """Return random gate and up (rows, F), or both packed in one tensor."""
    widths = (2 * width,) if packed else (width, width)
    return Arguments(tuple(draw(device, dtype, rows, each) for each in widths), options)


# Llama 3 8B, GPT-2 small and XL.
GATED_SHAPES = tuple({"rows": 2**16, "width": width} for width in (14336, 3072, 6400))
GATED_COMPILED = tuple(
    grid(rows=(8192,), width=(14336, 3072, 6400), packed=(False, True), dtype=(torch.bfloat16, torch.float32))
)
GATED_EXAMPLES = ({"rows": 6, "width": 96}, {"rows": 5, "width": 24, "packed": True})
GATED_HUGE = {"rows": 2**17 + 1, "width": 8192, "packed": True}
