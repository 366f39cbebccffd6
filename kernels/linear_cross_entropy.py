"""Cross-entropy of a linear layer's output without all logits in memory: loss and gradients one chunk of rows at a time.

For each chunk, one product writes logits = x weight^T into a buffer, one kernel computes their losses and overwrites them with
their gradient, and two more products give the gradients of x and weight. The backward pass only scales those gradients by the
gradient of the loss.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import checks, reference
from .cross_entropy import EVERY_OPTION, empty_outputs, launch_backward, launch_forward, launch_fused
from .cross_entropy_kernels import cross_entropy_backward, cross_entropy_forward, cross_entropy_fused
from .dispatch import autocast_dtype, use_triton
from .linear_chunks import chunk_shape as chunk_shape
from .linear_chunks import over_chunks
from .loss_options import LossOptions, Reduction
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .registration import count_no_flops, custom_op


def _statistics(x, weight, bias, targets, launch, options, chunking: tuple[int, bool, int], wanted) -> Any:
    targets = targets.contiguous()
    outputs = empty_outputs(targets, options)

    def process(logits: Tensor, rows: slice) -> None:
        parts = (t.view(-1)[rows] if t.shape == targets.shape else t for t in (targets, *outputs))
        launch(logits[None], *parts, options)

    gradients = over_chunks(x, weight, bias, process, *chunking, wanted)
    return *outputs, *gradients


def _empty_gradients(x, weight, dw_dtype, db_dtype, want_dx, want_dw, want_db):
    return (
        torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if want_dw else 0, dtype=dw_dtype, device=x.device),
        torch.empty(weight.shape[0] if want_db else 0, dtype=db_dtype, device=x.device),
    )


@custom_op("linear_cross_entropy_sum")
def _sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    z_loss_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    return_accuracy: bool,
    return_predictions: bool,
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = LossOptions.from_schema(
        class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap,
        return_lse, return_accuracy, return_predictions,
    )  # fmt: skip
    losses, *others = _statistics(
        x, weight, bias, targets, launch_fused, options,
        (memory_budget, accumulate_in_float32, num_classes), (want_dx, want_dw, want_db),
    )  # fmt: skip
    return losses.sum(), *others  # pyright: ignore[reportReturnType]


@_sum.register_fake
def _(x, weight, bias, targets, *options):
    *options, _, accumulate_in_float32, _, want_dx, want_dw, want_db = options
    losses, *statistics = empty_outputs(targets, LossOptions.from_schema(*options))
    dw_dtype = torch.float32 if accumulate_in_float32 else x.dtype
    return losses.sum(), *statistics, *_empty_gradients(x, weight, dw_dtype, torch.float32, want_dx, want_dw, want_db)


@custom_op("linear_cross_entropy_sum_backward")
def _sum_backward(
    dloss: Tensor, dx: Tensor, dw: Tensor, db: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # x is an input so that a second differentiation raises an error: dx and dw do not depend on x, and would give zero.
    # Round once, after scaling. As a 1-D tensor dloss takes part in type promotion, so that it is not rounded first.
    dloss, scaled_dw = dloss.reshape(1), torch.empty(dw.shape, dtype=weight.dtype, device=dw.device)
    scaled_db = torch.empty(db.shape, dtype=db.dtype if bias is None else bias.dtype, device=db.device)
    return (
        torch.mul(dx, dloss, out=torch.empty_like(dx)),
        torch.mul(dw, dloss, out=scaled_dw),
        torch.mul(db, dloss, out=scaled_db),
    )


@_sum_backward.register_fake
def _(dloss, dx, dw, db, x, weight, bias):
    return (
        torch.empty_like(dx),
        torch.empty(dw.shape, dtype=weight.dtype, device=dw.device),
        torch.empty(db.shape, dtype=db.dtype if bias is None else bias.dtype, device=db.device),
    )


def _save_sum(ctx, inputs, output) -> None:
    x, weight, bias, targets, class_weights, z_loss_tensor, *numbers, return_lse, _, _ = inputs[:-6]
    _, row_max, log_sum, predicted, *gradients = output
    rows = (targets, row_max, log_sum, class_weights, z_loss_tensor) if return_lse else ()
    ctx.save_for_backward(*gradients, x, weight, bias, *rows)
    ctx.numbers, ctx.chunking, ctx.wanted = numbers, inputs[-6:-3], inputs[-3:]
    # Otherwise autograd allocates zeros as the gradient of each output, and one of them has the size of weight.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, predicted, *gradients, *(() if return_lse else (log_sum,)))


def _backward_of_sum(ctx, dloss: Tensor | None, _, dlse: Tensor | None, *__):
    dx, dw, db, x, weight, bias, *rows = ctx.saved_tensors
    gradients = [None] * 3
    if dloss is not None:
        gradients = _sum_backward(dloss, dx, dw, db, x, weight, bias)
    if dlse is not None:
        # The gradient of lse is known only now, so recompute the logits.
        more = _rows_backward(None, dlse, x, weight, bias, *rows, *ctx.numbers, *ctx.chunking, *ctx.wanted)
        gradients = [b if a is None else a + b for a, b in zip(gradients, more, strict=True)]
    return _select(gradients, ctx.wanted, 19)


def _select(gradients, wanted, num_inputs):
    shown = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return *shown, *(None,) * (num_inputs - 3)


_sum.register_autograd(_backward_of_sum, setup_context=_save_sum)


@custom_op("linear_cross_entropy")
def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    z_loss_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    return_accuracy: bool,
    return_predictions: bool,
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = LossOptions.from_schema(
        class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap,
        return_lse, return_accuracy, return_predictions,
    )  # fmt: skip
    chunking = memory_budget, accumulate_in_float32, num_classes
    return _statistics(x, weight, bias, targets, launch_forward, options, chunking, (False, False, False))[:4]


@_rows.register_fake
def _(x, weight, bias, targets, *options):
    return empty_outputs(targets, LossOptions.from_schema(*options[:-3]))


@custom_op("linear_cross_entropy_backward")
def _rows_backward(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    class_weights: Tensor | None,
    z_loss_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    memory_budget: int,
    accumulate_in_float32: bool,
    num_classes: int,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions.from_schema(class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap)
    given: Any = [None if t is None else t.reshape(-1) for t in (dlosses, dlse, targets, row_max, log_sum)]

    def process(logits: Tensor, rows: slice) -> None:
        dlosses, dlse, *inputs = (None if t is None else t[rows] for t in given)
        launch_backward(dlosses, dlse, logits[None], *inputs, logits[None], options)  # pyright: ignore[reportCallIssue]

    chunking = memory_budget, accumulate_in_float32, num_classes
    dx, dw, db = over_chunks(x, weight, bias, process, *chunking, (want_dx, want_dw, want_db))
    return dx, dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


@_rows_backward.register_fake
def _(dlosses, dlse, x, weight, bias, *saved_and_options):
    db_dtype = torch.float32 if bias is None else bias.dtype
    return _empty_gradients(x, weight, weight.dtype, db_dtype, *saved_and_options[-3:])


def _save_rows(ctx, inputs, output) -> None:
    x, weight, bias, targets, class_weights, z_loss_tensor, *numbers, return_lse, _, _ = inputs[:-3]
    _, row_max, log_sum, predicted = output
    ctx.save_for_backward(x, weight, bias, targets, row_max, log_sum, class_weights, z_loss_tensor)
    ctx.set_materialize_grads(False)
    ctx.numbers = *numbers, *inputs[-3:]
    ctx.mark_non_differentiable(row_max, predicted, *(() if return_lse else (log_sum,)))


def _backward_of_rows(ctx, dlosses: Tensor | None, _, dlse: Tensor | None, __):
    wanted = ctx.needs_input_grad[:3]
    gradients = (None,) * 3
    if dlosses is not None or dlse is not None:
        gradients = _rows_backward(dlosses, dlse, *ctx.saved_tensors, *ctx.numbers, *wanted)
    return _select(gradients, wanted, 16)


_rows.register_autograd(_backward_of_rows, setup_context=_save_rows)


def _product_flops(x_shape, weight_shape, products: int) -> int:
    return 2 * x_shape.numel() * weight_shape[0] * products


@register_flop_formula(torch.ops.tilewright.linear_cross_entropy_sum)
def _sum_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    *_, want_dx, want_dw, _ = args
    return _product_flops(x_shape, weight_shape, 1 + want_dx + want_dw)


count_no_flops(_sum_backward)


@register_flop_formula(torch.ops.tilewright.linear_cross_entropy)
def _rows_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _product_flops(x_shape, weight_shape, 1)


@register_flop_formula(torch.ops.tilewright.linear_cross_entropy_backward)
def _rows_backward_flops(dlosses_shape, dlse_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    # The logits are recomputed.
    *_, want_dx, want_dw, _ = args
    return _product_flops(x_shape, weight_shape, 1 + want_dx + want_dw)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predictions: bool = False,
    return_z_loss: bool = False,
    memory_budget: int = 512 * 2**20,
    accumulate_in_float32: bool = True,
    num_classes: int | None = None,
) -> Any:
    """Compute `cross_entropy(x @ weight.T + bias, targets)` with at most `memory_budget` bytes of logits, or one row.

    x (..., D), weight (V, D), targets (...), bias (V). Options and result are the same as for `cross_entropy`. Products are
    computed in the dtype of x (or the autocast dtype), for any dtype of weight and bias. The gradient of weight is summed over
    chunks in float32 and rounded once to the dtype of weight; without `accumulate_in_float32` it is summed in the dtype of x.
    Rows of weight and bias from `num_classes` on are padding, which completes tiles of the products: they are not classes, and
    their gradient is zero. `class_weights` then has `num_classes` elements.

    For "mean" and "sum", the forward pass computes the gradients that x, weight and bias require and saves them for the
    backward pass: (..., D) in the dtype of x, and (V, D) in float32. For "none", and if a gradient flows into the returned lse,
    the backward pass recomputes the logits: detach an lse that is only logged. The values in an ignored row of x affect no
    loss and no gradient of x. The gradient of weight is a product with all rows of x, so they must be finite.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        shapes = f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected (..., D) and (V, D) with D and V of 1 or more")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), one for each row of weight")
    checks.check_dtype(checks.FLOATING, x=x, weight=weight, bias=bias)
    checks.check_device(x=x, weight=weight, bias=bias)
    checks.check_int("memory_budget", memory_budget, 1)
    checks.check_int("num_classes", num_classes, 1, weight.shape[0])
    classes = weight.shape[0] if num_classes is None else num_classes
    flags = (return_lse, return_accuracy, return_predictions, return_z_loss)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, class_weights, *flags)
    options.check(targets, x.shape[:-1], classes, reduction, x=x)
    if not use_triton(x, weight, bias):
        return reference.linear_cross_entropy(
            x, weight, targets, ignore_index, label_smoothing, z_loss, softcap, reduction,
            bias=bias, class_weights=class_weights, return_lse=return_lse, return_accuracy=return_accuracy,
            return_predictions=return_predictions, return_z_loss=return_z_loss,
            memory_budget=memory_budget, num_classes=classes,
        )  # fmt: skip
    x = x.to(autocast_dtype(x) or x.dtype)
    options = options.without_dynamic_floats(x)
    flat = *options.loss_arguments(), *options.output_arguments(), memory_budget, accumulate_in_float32, classes
    wanted = x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    if torch.is_grad_enabled() and any(wanted) and reduction != "none":
        losses, row_max, log_sum, predicted, *_ = _sum(x, weight, bias, targets, *flat, *wanted)
    else:
        losses, row_max, log_sum, predicted = _rows(x, weight, bias, targets, *flat)
    lse = row_max + log_sum if return_lse or return_z_loss else None
    return options.output(losses, targets, reduction, lse, predicted)


def _costs(itemsize: int, rows: int, d_model: int, vocab_size: int) -> Costs:
    # Three matrix products. Reads x and weight, writes their gradients, no logits. The forward pass computes the gradients.
    moved = 2 * (rows + vocab_size) * d_model * itemsize + 12 * rows
    return Costs(None, None, Cost(moved, 3 * 2 * rows * d_model * vocab_size))


def _arguments(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    d_model: int,
    vocab_size: int,
    every_option: bool = False,
    **options: Any,
) -> Arguments:
    x, weight = draw(device, dtype, rows, d_model), draw(device, dtype, vocab_size, d_model, scale=d_model**-0.5)
    targets = torch.randint(vocab_size, (rows,), device=device)
    if not every_option:
        return Arguments((x, weight, targets), options)
    vectors = {"bias": draw(device, dtype, vocab_size), "class_weights": torch.rand(vocab_size, device=device)}
    return Arguments((x, weight, targets), EVERY_OPTION | vectors | options)


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
        examples=(
            {"rows": 6, "d_model": 16, "vocab_size": 100},
            {"rows": 6, "d_model": 16, "vocab_size": 100, "reduction": "none"},
            {"rows": 5, "d_model": 8, "vocab_size": 37, "every_option": True},
        ),
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
