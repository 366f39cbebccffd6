"""SwiGLU: y = silu(gate) * up, split or packed, with one pass over memory forward and one backward."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import jit, tl, use_triton
from .gated import (
    GATED_COMPILED,
    GATED_EXAMPLES,
    GATED_HUGE,
    GATED_SHAPES,
    SIZES,
    backward_sharding,
    check_gated,
    empty_gradients,
    empty_result,
    forward_sharding,
    gated_arguments,
    gated_costs,
    gated_tile,
    halves,
    launch_gated,
    load_tile,
    needed_gradients,
    store_tile,
)
from .op import Op, record
from .registration import count_no_flops, custom_op
from .sharding import sharded_as


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
    """Write one tile of the gradients; dgate or dup is None if it is not needed."""
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


@custom_op("swiglu")
def _swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    y = empty_result(gate, up)
    launch_gated(swiglu_forward, halves(gate, up), (y,))
    return y


@_swiglu.register_fake
@sharded_as(_swiglu, forward_sharding)
def _(gate, up):
    return empty_result(gate, up)


@custom_op("swiglu_backward")
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor | None, needs_gate: bool, needs_up: bool) -> tuple[Tensor, Tensor]:
    gradients = empty_gradients(gate, up, needs_gate, needs_up)
    outputs = needed_gradients(gradients, up is None, needs_gate, needs_up)
    launch_gated(swiglu_backward, (dy, *halves(gate, up)), outputs)
    return gradients


@_swiglu_backward.register_fake
@sharded_as(_swiglu_backward, backward_sharding)
def _(dy, gate, up, needs_gate, needs_up):
    return empty_gradients(gate, up, needs_gate, needs_up)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor):
    needs_gate, needs_up = ctx.needs_input_grad[:2]
    dgate, dup = _swiglu_backward(dy, *ctx.saved_tensors, needs_gate, needs_up)
    return dgate if needs_gate else None, dup if needs_up else None


# No autocast rule: PyTorch's silu and mul have none either; they compute in the dtypes of their inputs.
_swiglu.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(_swiglu, _swiglu_backward)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, eq. 6), elementwise, computed in float32 and rounded once.

    gate, up (..., F) -> (..., F); with `up` omitted, `gate` is packed (..., 2F), gate before up. The backward kernel then
    writes the packed gradient directly, without a concatenation. Supports float32, float16 and bfloat16; if gate and up differ,
    the result has the dtype that PyTorch promotes both to. float64 runs the reference. Only the inputs are saved for the
    backward pass, which computes only the gradients that are needed. Copies inputs unless rows are evenly strided and
    contiguous.
    """
    check_gated(gate, up)
    if use_triton(gate, up):
        return _swiglu(gate, up)
    return reference.swiglu(gate, up)


record(
    Op(
        function=swiglu,
        reference=reference.swiglu,
        kernels=(swiglu_forward, swiglu_backward),
        arguments=gated_arguments,
        cost=partial(gated_costs, 5, 12),
        shapes=GATED_SHAPES,
        examples=GATED_EXAMPLES,
        compiled=GATED_COMPILED,
        baseline=lambda gate, up: F.silu(gate) * up,
        over="width",
        huge=GATED_HUGE,
    )
)
