"""SwiGLU: y = silu(gate) * up, forward and backward in one pass over memory each, split or packed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .dispatch import jit, tl, use_triton
from .gated import (
    SIZES,
    backward_sharding,
    check_gated,
    empty_gradients,
    empty_result,
    forward_sharding,
    gated_tile,
    halves,
    launch_config,
    launch_gated,
    load_tile,
    store_tile,
    wanted_halves,
)
from .inspect import KernelCase
from .sharding import sharded_as
from .shared import count_no_flops, register_fake


@jit(do_not_specialize=SIZES)
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
    rows, columns, mask = gated_tile(num_rows, width, num_column_blocks, BLOCK_ROWS, BLOCK_WIDTH)
    gate = load_tile(gate_ptr, rows, gate_row_stride, columns, mask)
    up = load_tile(up_ptr, rows, up_row_stride, columns, mask)
    store_tile(y_ptr, rows, y_row_stride, columns, gate / (1.0 + tl.exp(-gate)) * up, mask)


@jit(do_not_specialize=SIZES)
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
    """Write one tile of the gradients; that of gate or of up is None where it is not needed."""
    rows, columns, mask = gated_tile(num_rows, width, num_column_blocks, BLOCK_ROWS, BLOCK_WIDTH)
    dy = load_tile(dy_ptr, rows, dy_row_stride, columns, mask)
    gate = load_tile(gate_ptr, rows, gate_row_stride, columns, mask)
    # With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    scaled = dy * sigmoid
    if dgate_ptr is not None:
        up = load_tile(up_ptr, rows, up_row_stride, columns, mask)
        dgate = scaled * up * (1.0 + gate * (1.0 - sigmoid))
        store_tile(dgate_ptr, rows, dgate_row_stride, columns, dgate, mask)
    if dup_ptr is not None:
        store_tile(dup_ptr, rows, dup_row_stride, columns, scaled * gate, mask)


@torch.library.custom_op("tilewright::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    y = empty_result(gate, up)
    launch_gated(swiglu_forward, halves(gate, up), (y,))
    return y


@register_fake(_swiglu)
@sharded_as(_swiglu, forward_sharding)
def _(gate, up):
    return empty_result(gate, up)


@torch.library.custom_op("tilewright::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, needs_gate: bool, needs_up: bool) -> tuple[Tensor, Tensor]:
    gradients = empty_gradients(gate, up, needs_gate, needs_up)
    outputs = wanted_halves(gradients, up is None, needs_gate, needs_up)
    launch_gated(swiglu_backward, (dy, *halves(gate, up)), outputs)
    return gradients


@register_fake(_swiglu_backward)
@sharded_as(_swiglu_backward, backward_sharding)
def _(dy, gate, up, needs_gate, needs_up):
    return empty_gradients(gate, up, needs_gate, needs_up)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor):
    needs_gate, needs_up = ctx.needs_input_grad[:2]
    dgate, dup = torch.ops.tilewright.swiglu_backward(dy, *ctx.saved_tensors, needs_gate, needs_up)
    return dgate if needs_gate else None, dup if needs_up else None


# No autocast rule: silu and mul have none in PyTorch either, they compute in the dtypes that they are given.
_swiglu.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(torch.ops.tilewright.swiglu, torch.ops.tilewright.swiglu_backward)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, eq. 6), elementwise, computed in float32 and rounded once.

    gate, up (..., F) -> (..., F); with `up` omitted, `gate` is packed (..., 2F), gate before up, and so is its gradient,
    which the backward kernel writes in place of a concatenation. float32, float16, bfloat16; where gate and up differ, the
    result has the dtype that PyTorch promotes both to. float64 runs the reference. Only the inputs are kept for the backward
    pass, which computes the gradients that are needed. Slices and repeated rows are read in place; rows that no one stride
    reaches, or whose elements are no neighbours, are copied.
    """
    check_gated(gate, up)
    if use_triton(gate, up):
        return torch.ops.tilewright.swiglu(gate, up)
    return reference.swiglu(gate, up)


def compile_cases() -> Iterator[KernelCase]:
    """Yield both kernels as they are launched for GPT-2 small and XL and Llama 3 8B, 8192 tokens, split and packed."""
    tokens = 8192
    for dtype, element_size in (("bf16", 2), ("fp32", 4)):
        for d_ff in (3072, 6400, 14336):
            for form, num_rows, width in (("split", 1, tokens * d_ff), ("packed", tokens, d_ff)):
                config = launch_config(num_rows, width, element_size)
                num_warps = config.pop("num_warps")
                constants = config
                for direction, kernel in (("forward", swiglu_forward), ("backward", swiglu_backward)):
                    types = {
                        name: f"*{dtype}" if name.endswith("_ptr") else "i64" if name.endswith("_stride") else "i32"
                        for name in kernel.arg_names
                        if name not in constants
                    }
                    aligned = ("width", *(name for name in types if name.endswith("_stride")))
                    name = f"swiglu {direction} {form} F {d_ff} {dtype}"
                    yield KernelCase(name, kernel, types, constants, num_warps, aligned=aligned)
