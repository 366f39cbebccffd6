"""Cross-entropy of a linear layer's output that never holds all logits: chunks of rows, loss and gradient at once.

For each chunk: logits = x weight^T into one buffer, one kernel turns them into losses and, in place, into their gradient, and
two more products give the gradients of x and weight. The backward pass only scales those by the gradient of the loss.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .cross_entropy import (
    EVERY_OPTION,
    check_dtype,
    check_options,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_fused,
    empty_outputs,
    launch_backward,
    launch_forward,
    launch_fused,
)
from .dispatch import autocast_dtype, use_triton
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .reference import Reduction
from .registration import count_no_flops, custom_op

# Rows of a chunk come in tiles of the matrix product, and rows of the buffer begin on a cache line whatever the vocabulary.
TILE_ROWS = 128
ROW_ALIGNMENT = 64


def chunk_shape(num_rows: int, vocabulary: int, itemsize: int, memory_budget: int) -> tuple[int, int]:
    """Return the rows and columns of the buffer of logits: at most `memory_budget` bytes, but one row at least."""
    columns = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    limit = max(1, memory_budget // (columns * itemsize))
    if limit > TILE_ROWS:
        limit = limit // TILE_ROWS * TILE_ROWS
    num_chunks = max(1, -(-num_rows // limit))
    rows = -(-num_rows // num_chunks)  # chunks of one size: a short last one would leave the GPU idle
    if num_chunks > 1:
        rows = min(limit, -(-rows // TILE_ROWS) * TILE_ROWS)
    return rows, columns


@cache
def _adds_to_float32(device: torch.device) -> bool:
    # Whether this PyTorch adds a product of half precision to a float32 matrix; older ones refuse the dtype of the sum.
    half, wide = torch.zeros(8, 8, dtype=torch.float16, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(wide, half, half, torch.float32, out=wide)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    # total (M, N) = a (M, K) b (K, N), or += after the first; products of half precision are summed in the dtype of total.
    if total.dtype != a.dtype and not a.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    elif _adds_to_float32(a.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        for part, a_part in zip(total.split(8192), a.split(8192), strict=True):
            part += torch.ops.aten.mm.dtype(a_part, b, total.dtype)


def over_chunks(
    x: Tensor,
    weight: Tensor,
    process: Callable[[Tensor, slice], None],
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor]:
    """Call `process(logits, rows)` for each chunk, and multiply the gradient that it leaves in `logits` by weight and x.

    x (..., D), weight (V, D) -> dx (..., D), dw (V, D), each empty where it is not wanted. Rows of weight from `num_classes`
    on are padding: whole tiles of the products, but no logits.
    """
    rows, weight = x.reshape(-1, x.shape[-1]), weight.to(x.dtype)
    num_rows, vocabulary = rows.shape[0], weight.shape[0]
    dx = torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device)
    dw_dtype = torch.float32 if accumulate_in_float32 else x.dtype
    # Without rows no chunk writes it.
    allocate = torch.empty if num_rows > 0 else torch.zeros
    dw = allocate(weight.shape if want_dw else 0, dtype=dw_dtype, device=x.device)
    chunk_rows, columns = chunk_shape(num_rows, vocabulary, x.element_size(), memory_budget)
    buffer = torch.empty(chunk_rows, columns, dtype=x.dtype, device=x.device)
    # PyTorch's float16 product on CPUs multiplies what lies between the rows by 0, which leaves a NaN a NaN.
    buffer[:, vocabulary:].zero_()
    for start in range(0, num_rows, max(1, chunk_rows)):
        chunk = rows[start : start + chunk_rows]
        logits = buffer[: chunk.shape[0], :vocabulary]
        torch.mm(chunk, weight.t(), out=logits)
        process(logits[:, :num_classes], slice(start, start + chunk.shape[0]))
        logits[:, num_classes:].zero_()
        if want_dx:
            torch.mm(logits, weight, out=dx.view(rows.shape)[start : start + chunk.shape[0]])
        if want_dw:
            _add_product(dw, logits.t(), chunk, first=start == 0)
    return dx, dw


def _statistics(x, weight, targets, launch, options, return_lse, return_accuracy, chunking, wanted):
    targets = targets.contiguous()
    flat_targets = targets.view(-1)
    losses, top, log_total, correct = empty_outputs(targets, return_accuracy)

    def process(logits: Tensor, rows: slice) -> None:
        statistics = (t.view(-1)[rows] for t in (losses, top, log_total))
        launch(
            logits[None], flat_targets[rows], *statistics, correct.view(-1)[rows] if return_accuracy else None,
            *options, return_lse,
        )  # fmt: skip

    gradients = over_chunks(x, weight, process, *chunking, *wanted)
    return losses, top, log_total, correct, *gradients


@custom_op("linear_cross_entropy_sum")
def _sum(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    return_accuracy: bool,
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    losses, top, log_total, correct, dx, dw = _statistics(
        x, weight, targets, launch_fused, (ignore_index, label_smoothing, z_loss, softcap),
        return_lse, return_accuracy, (memory_budget, accumulate_in_float32, num_classes), (want_dx, want_dw),
    )  # fmt: skip
    return losses.sum(), top, log_total, correct, dx, dw


@_sum.register_fake
def _(
    x, weight, targets, ignore_index, label_smoothing, z_loss, softcap, return_lse, return_accuracy,
    memory_budget, accumulate_in_float32, num_classes, want_dx, want_dw,
):  # fmt: skip
    losses, *statistics = empty_outputs(targets, return_accuracy)
    dx = torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device)
    dw_dtype = torch.float32 if accumulate_in_float32 else x.dtype
    dw = torch.empty(weight.shape if want_dw else 0, dtype=dw_dtype, device=x.device)
    return losses.sum(), *statistics, dx, dw


@custom_op("linear_cross_entropy_sum_backward")
def _sum_backward(dloss: Tensor, dx: Tensor, dw: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # x is passed so that a second differentiation, of which dx and dw know nothing, is an error and not a silent zero.
    # One rounding, after the scaling. With one dimension dloss takes part in type promotion: the factor is not rounded.
    dloss, scaled_dw = dloss.reshape(1), torch.empty(dw.shape, dtype=weight.dtype, device=dw.device)
    return torch.mul(dx, dloss, out=torch.empty_like(dx)), torch.mul(dw, dloss, out=scaled_dw)


@_sum_backward.register_fake
def _(dloss, dx, dw, x, weight):
    return torch.empty_like(dx), torch.empty(dw.shape, dtype=weight.dtype, device=dw.device)


def _save_sum(ctx, inputs, output) -> None:
    _, *statistics, dx, dw = output
    ctx.save_for_backward(dx, dw, *inputs[:2])
    ctx.wanted = inputs[-2:]
    # Else autograd allocates a gradient of zeros for each output, among them one of the size of weight.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*statistics, dx, dw)


def _backward_of_sum(ctx, dloss: Tensor, *_):
    dx, dw = _sum_backward(dloss, *ctx.saved_tensors)
    want_dx, want_dw = ctx.wanted
    return dx if want_dx else None, dw if want_dw else None, *(None,) * 12


_sum.register_autograd(_backward_of_sum, setup_context=_save_sum)


@custom_op("linear_cross_entropy")
def _rows(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    return_accuracy: bool,
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _statistics(
        x, weight, targets, launch_forward, (ignore_index, label_smoothing, z_loss, softcap),
        return_lse, return_accuracy, (memory_budget, accumulate_in_float32, num_classes), (False, False),
    )[:4]  # fmt: skip


@_rows.register_fake
def _(
    x, weight, targets, ignore_index, label_smoothing, z_loss, softcap, return_lse, return_accuracy,
    memory_budget, accumulate_in_float32, num_classes,
):  # fmt: skip
    return empty_outputs(targets, return_accuracy)


@custom_op("linear_cross_entropy_backward")
def _rows_backward(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    top: Tensor,
    log_total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor]:
    dlosses, targets, top, log_total = (t.reshape(-1) for t in (dlosses, targets, top, log_total))

    def process(logits: Tensor, rows: slice) -> None:
        options = (ignore_index, label_smoothing, z_loss, softcap)
        inputs = targets[rows], top[rows], log_total[rows]
        launch_backward(dlosses[rows], logits[None], *inputs, logits[None], *options)

    dx, dw = over_chunks(x, weight, process, memory_budget, accumulate_in_float32, num_classes, want_dx, want_dw)
    return dx, dw.to(weight.dtype)


@_rows_backward.register_fake
def _(
    dlosses, x, weight, targets, top, log_total, ignore_index, label_smoothing, z_loss, softcap,
    memory_budget, accumulate_in_float32, num_classes, want_dx, want_dw,
):  # fmt: skip
    return (
        torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if want_dw else 0, dtype=weight.dtype, device=x.device),
    )


def _save_rows(ctx, inputs, output) -> None:
    x, weight, targets, *options, _, _, memory_budget, accumulate_in_float32, num_classes = inputs
    _, *statistics, correct = output
    ctx.save_for_backward(x, weight, targets, *statistics)
    ctx.set_materialize_grads(False)
    ctx.options = (*options, memory_budget, accumulate_in_float32, num_classes)
    ctx.mark_non_differentiable(*statistics, correct)


def _backward_of_rows(ctx, dlosses: Tensor, *_):
    want_dx, want_dw = ctx.needs_input_grad[:2]
    dx, dw = _rows_backward(dlosses, *ctx.saved_tensors, *ctx.options, want_dx, want_dw)
    return dx if want_dx else None, dw if want_dw else None, *(None,) * 10


_rows.register_autograd(_backward_of_rows, setup_context=_save_rows)


@register_flop_formula(torch.ops.tilewright.linear_cross_entropy_sum)
def _sum_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    *_, want_dx, want_dw = args
    return 2 * x_shape.numel() * weight_shape[0] * (1 + want_dx + want_dw)


count_no_flops(_sum_backward)


@register_flop_formula(torch.ops.tilewright.linear_cross_entropy)
def _rows_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


@register_flop_formula(torch.ops.tilewright.linear_cross_entropy_backward)
def _rows_backward_flops(dlosses_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    # The logits are computed a second time.
    *_, want_dx, want_dw = args
    return 2 * x_shape.numel() * weight_shape[0] * (1 + want_dx + want_dw)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    *,
    return_lse: bool = False,
    return_accuracy: bool = False,
    memory_budget: int = 512 * 2**20,
    accumulate_in_float32: bool = True,
    num_classes: int | None = None,
) -> Any:
    """`cross_entropy(x @ weight.T, targets)` that holds at most `memory_budget` bytes of logits, but one row at least.

    x (..., D), weight (V, D), targets (...); options and result are those of `cross_entropy`. Products are computed in the
    dtype of x (under autocast, in autocast's), whatever that of weight; the gradient of weight is summed over the chunks in
    float32, unless `accumulate_in_float32` is off, and rounded once to the dtype of weight. Rows of weight from `num_classes`
    on are padding, for products of whole tiles: they are no classes, and their gradient is zero.

    Gradients of "mean" and "sum" are computed in the forward pass, as far as x and weight require them, and kept for the
    backward pass: (..., D) in the dtype of x and (V, D) in float32. With reduction="none" the logits are computed again.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        shapes = f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: allowed are (..., D) and (V, D) with V of 1 or more")
    check_options(targets, x.shape[:-1], label_smoothing, z_loss, softcap, reduction)
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}: allowed is a number of bytes above 0")
    classes = weight.shape[0] if num_classes is None else num_classes
    if not 0 < classes <= weight.shape[0]:
        raise ValueError(f"num_classes is {classes}: allowed is 1 to {weight.shape[0]}, the rows of weight")
    if not use_triton(x):
        return reference.linear_cross_entropy(
            x, weight, targets, ignore_index, label_smoothing, z_loss, softcap, reduction,
            return_lse=return_lse, return_accuracy=return_accuracy, memory_budget=memory_budget, num_classes=classes,
        )  # fmt: skip
    check_dtype("x", x)
    check_dtype("weight", weight)
    x = x.to(autocast_dtype(x) or x.dtype)
    options = (ignore_index, label_smoothing, z_loss, softcap, return_lse, return_accuracy)
    options = (*options, memory_budget, accumulate_in_float32, classes)
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if trains and reduction != "none":
        wanted = x.requires_grad, weight.requires_grad
        losses, top, log_total, correct, *_ = _sum(x, weight, targets, *options, *wanted)
    else:
        losses, top, log_total, correct = _rows(x, weight, targets, *options)
    return reference.reduce_losses(
        losses,
        targets != ignore_index,
        reduction,
        top + log_total if return_lse else None,
        correct if return_accuracy else None,
    )


def _costs(itemsize: int, rows: int, d_model: int, vocab_size: int) -> Costs:
    # Three matrix products; x and weight in, their gradients out, no logits. The forward pass computes the gradients.
    moved = 2 * (rows + vocab_size) * d_model * itemsize + 12 * rows
    return Costs(None, None, Cost(moved, 3 * 2 * rows * d_model * vocab_size))


def _arguments(
    device: torch.device, dtype: torch.dtype, rows: int, d_model: int, vocab_size: int, every_option: bool = False
) -> Arguments:
    x, weight = draw(device, dtype, rows, d_model), draw(device, dtype, vocab_size, d_model, scale=d_model**-0.5)
    targets = torch.randint(vocab_size, (rows,), device=device)
    return Arguments((x, weight, targets), EVERY_OPTION if every_option else {})


record(
    Op(
        function=linear_cross_entropy,
        reference=reference.linear_cross_entropy,
        kernels=(cross_entropy_forward, cross_entropy_backward, cross_entropy_fused),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple(
            {"rows": 8192, "d_model": d_model, "vocab_size": vocab_size}
            for d_model, vocab_size in ((4096, 128_256), (768, 50_304), (2304, 262_144))
        ),
        examples=({"rows": 6, "d_model": 16, "vocab_size": 100},),
        compiled=tuple(
            grid(
                rows=(8192,),
                d_model=(64,),
                vocab_size=(50_257, 128_256, 262_144),
                every_option=(False, True),
                dtype=(torch.bfloat16, torch.float32),
            )
        ),
        baseline=lambda x, weight, targets: F.cross_entropy((x @ weight.T).float(), targets),
        over="vocab_size",
        bound_by="flops",
    )
)
