"""GEGLU: y = gelu(gate) * up, split or packed, with one pass over memory forward and one backward."""

from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .checks import check_choice
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
from .reference import GeluApproximation
from .registration import count_no_flops, custom_op
from .sharding import sharded_as


@jit
def _gelu(gate, TANH: tl.constexpr):
    # Returns p and gate * p', with gelu(gate) = gate * p; p is the normal distribution function at gate.
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) (gate + 0.044715 gate^3). With e = exp(-2 abs(u)) neither p nor p'
        # is a difference of nearly equal numbers.
        square = gate * gate
        double_u = gate * (1.5957691216057308 + 0.07135481282605887 * square)
        e = tl.exp(-tl.abs(double_u))
        inverse = 1.0 / (1.0 + e)
        p = tl.where(double_u < 0.0, e * inverse, inverse)
        slope = gate * e * inverse * inverse * (1.5957691216057308 + 0.2140644384781766 * square)
    else:
        p = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        slope = gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    return p, slope


@jit(do_not_specialize=SIZES)
def geglu_forward(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_row_stride,
    up_row_stride,
    y_row_stride,
    num_rows,
    width,
    num_column_blocks,
    TANH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Write one tile of the result."""
    rows, columns, mask = gated_tile(num_rows, width, num_column_blocks, BLOCK_ROWS, BLOCK_WIDTH)
    gate = load_tile(gate_ptr, rows, gate_row_stride, columns, mask)
    up = load_tile(up_ptr, rows, up_row_stride, columns, mask)
    p, _ = _gelu(gate, TANH)
    store_tile(y_ptr, rows, y_row_stride, columns, gate * p * up, mask)


@jit(do_not_specialize=SIZES)
def geglu_backward(
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
    TANH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Write one tile of the gradients; dgate or dup is None if it is not needed."""
    rows, columns, mask = gated_tile(num_rows, width, num_column_blocks, BLOCK_ROWS, BLOCK_WIDTH)
    dy = load_tile(dy_ptr, rows, dy_row_stride, columns, mask)
    gate = load_tile(gate_ptr, rows, gate_row_stride, columns, mask)
    # With gelu(gate) = gate * p: dup = dy * gate * p, dgate = dy * up * (p + gate * p').
    p, slope = _gelu(gate, TANH)
    if dgate_ptr is not None:
        up = load_tile(up_ptr, rows, up_row_stride, columns, mask)
        store_tile(dgate_ptr, rows, dgate_row_stride, columns, dy * up * (p + slope), mask)
    if dup_ptr is not None:
        store_tile(dup_ptr, rows, dup_row_stride, columns, dy * gate * p, mask)


@custom_op("geglu")
def _geglu(gate: Tensor, up: Tensor | None, approximate: str) -> Tensor:
    y = empty_result(gate, up)
    launch_gated(geglu_forward, halves(gate, up), (y,), TANH=approximate == "tanh")
    return y


@_geglu.register_fake
@sharded_as(_geglu, forward_sharding)
def _(gate, up, approximate):
    return empty_result(gate, up)


@custom_op("geglu_backward")
def _geglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, approximate: str, needs_gate: bool, needs_up: bool
) -> tuple[Tensor, Tensor]:
    gradients = empty_gradients(gate, up, needs_gate, needs_up)
    outputs = needed_gradients(gradients, up is None, needs_gate, needs_up)
    launch_gated(geglu_backward, (dy, *halves(gate, up)), outputs, TANH=approximate == "tanh")
    return gradients


@_geglu_backward.register_fake
@sharded_as(_geglu_backward, backward_sharding)
def _(dy, gate, up, approximate, needs_gate, needs_up):
    return empty_gradients(gate, up, needs_gate, needs_up)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.approximate = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    needs_gate, needs_up = ctx.needs_input_grad[:2]
    dgate, dup = _geglu_backward(dy, *ctx.saved_tensors, ctx.approximate, needs_gate, needs_up)
    return dgate if needs_gate else None, dup if needs_up else None, None


# No autocast rule: PyTorch's gelu and mul have none either; they compute in the dtypes of their inputs.
_geglu.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(_geglu, _geglu_backward)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: GeluApproximation = "tanh") -> Tensor:
    """Return gelu(gate) * up (Shazeer 2020, eq. 7), elementwise, computed in float32 and rounded once.

    approximate="tanh" is the form of GPT-2 and Gemma; "none" uses the error function, as in `torch.nn.functional.gelu`
    (Hendrycks & Gimpel 2016, section 2).

    gate, up (..., F) -> (..., F); with `up` omitted, `gate` is packed (..., 2F), gate before up. The backward kernel then
    writes the packed gradient directly, without a concatenation. Supports float32, float16 and bfloat16; if gate and up differ,
    the result has the dtype that PyTorch promotes both to. float64 runs the reference. Only the inputs are saved for the
    backward pass, which computes only the gradients that are needed. Copies inputs unless rows are evenly strided and
    contiguous.
    """
    check_gated(gate, up)
    check_choice("approximate", approximate, get_args(GeluApproximation))
    if use_triton(gate, up):
        return _geglu(gate, up, approximate)
    return reference.geglu(gate, up, approximate)


record(
    Op(
        function=geglu,
        reference=reference.geglu,
        kernels=(geglu_forward, geglu_backward),
        arguments=gated_arguments,
        cost=partial(gated_costs, 9, 22),
        shapes=GATED_SHAPES,
        examples=(*GATED_EXAMPLES, GATED_EXAMPLES[0] | {"approximate": "none"}),
        compiled=(*GATED_COMPILED, {"rows": 8192, "width": 14336, "approximate": "none", "dtype": torch.bfloat16}),
        baseline=lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        over="width",
        huge=GATED_HUGE,
    )
)
