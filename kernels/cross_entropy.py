"""Cross-entropy of logits: its launches, the registered op and the public function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from .cross_entropy_kernels import cross_entropy_backward, cross_entropy_forward, cross_entropy_fused
from .dispatch import use_triton
from .launch import launch
from .loss_options import CrossEntropyOutput as CrossEntropyOutput
from .loss_options import LossOptions, Reduction
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .registration import count_no_flops, custom_op

# Columns of a block: 16 a thread, which is 32 bytes of half precision on their way and few enough registers to fill a
# multiprocessor. A softcap needs more registers, so programs are smaller then, and threads have 32 bytes of float32 too;
# several options together would spill with more than one vector a thread.
MAX_BLOCK = 8192


def launch_config(width: int, dtype: torch.dtype, options: LossOptions) -> dict[str, int]:
    """Return the block of columns, its vectors of 16 bytes and the warps that ship for a vocabulary of `width`."""
    capped = options.softcap is not None
    several = capped and (options.label_smoothing != 0.0 or options.return_accuracy)
    if several or options.class_weights is not None or options.return_predictions:
        block, thread_columns = MAX_BLOCK // 8, 16 // dtype.itemsize
    elif capped:
        block, thread_columns = MAX_BLOCK // 2, 32 // dtype.itemsize
    else:
        block, thread_columns = MAX_BLOCK, 16
    block = min(max(1 << (width - 1).bit_length(), 1024), block)
    return {"BLOCK": block, "VECTOR": 16 // dtype.itemsize, "num_warps": block // (32 * thread_columns)}


def _as_batches(logits: Tensor) -> Tensor:
    # (..., V) -> (outer, inner, V). Two strides of rows let the usual shift, logits[:, :-1], pass without a copy.
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() < 3:
        return logits.view(1, -1, logits.shape[-1])
    return logits.flatten(0, -3)


def empty_outputs(targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return uninitialised losses, row_max, log_sum, all (...) float32, and predicted.

    `row_max` is the greatest logit of a row and `log_sum` the rest of its lse; their sum alone is too coarse for the gradient.
    `predicted` is (...) int64 where predictions are asked for, (...) bool where only the accuracy is, else empty.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    shape = targets.shape if options.return_accuracy or options.return_predictions else 0
    dtype = torch.int64 if options.return_predictions else torch.bool
    return losses, torch.empty_like(losses), torch.empty_like(losses), torch.empty(shape, dtype=dtype, device=targets.device)


def _values(options: LossOptions, unused: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...], dict[str, Any]]:
    # Class weights and their sum, or tensors that no kernel will read; the numbers; which of them there are.
    weights = options.class_weights
    if weights is None:
        weighted = unused, unused
    else:
        weighted = weights.contiguous(), weights.sum(dtype=torch.float32) if options.label_smoothing != 0.0 else unused
    numbers = options.label_smoothing, options.z_loss, 1.0 if options.softcap is None else options.softcap
    return weighted, numbers, {
        "SMOOTHING": options.label_smoothing != 0.0,
        "Z_LOSS": "tensor" if isinstance(options.z_loss, Tensor) else "number" if options.z_loss != 0.0 else None,
        "SOFTCAP": options.softcap is not None,
        "WEIGHTED": weights is not None,
    }  # fmt: skip


def _is_shifted(logits: Tensor, block: int, vector: int) -> bool:
    # Whether rows of several blocks begin elsewhere than on a vector.
    steps = [stride for size, stride in zip(logits.shape[:2], logits.stride(), strict=False) if size > 1]
    return logits.shape[2] > block and any(stride % vector != 0 for stride in steps)


def _flags(options: LossOptions) -> dict[str, bool]:
    return {
        "READ_IGNORED": options.return_lse or options.return_predictions,
        "ACCURACY": options.return_accuracy and not options.return_predictions,
        "PREDICTIONS": options.return_predictions,
    }


def launch_forward(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    predicted: Tensor,
    options: LossOptions,
) -> None:
    """Fill losses, row_max, log_sum and predicted, all contiguous, from logits (outer, inner, V) and contiguous targets."""
    weights, numbers, present = _values(options, losses)
    config = launch_config(logits.shape[2], logits.dtype, options)
    if targets.numel() > 0:
        launch(
            cross_entropy_forward, targets.numel(),
            logits, targets, losses, row_max, log_sum, predicted, *weights,
            logits.stride(0), logits.stride(1), logits.shape[1], logits.shape[2], options.ignore_index, *numbers,
            **present, **_flags(options), SHIFTED=_is_shifted(logits, config["BLOCK"], config["VECTOR"]), **config,
        )  # fmt: skip


def launch_fused(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    predicted: Tensor,
    options: LossOptions,
) -> None:
    """Do as `launch_forward` and overwrite logits (1, N, V) with the gradient of the sum of the losses."""
    weights, numbers, present = _values(options, losses)
    launch(
        cross_entropy_fused, targets.numel(),
        logits, targets, losses, row_max, log_sum, predicted, *weights,
        logits.stride(1), logits.shape[2], options.ignore_index, *numbers,
        **present, **_flags(options), **launch_config(logits.shape[2], logits.dtype, options),
    )  # fmt: skip


def launch_backward(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    dlogits: Tensor,
    options: LossOptions,
) -> None:
    """Fill dlogits from logits, both (outer, inner, V); they may be one. One of dlosses and dlse (...) may be None."""
    targets = targets.contiguous()
    if dlosses is None:
        dlosses = row_max.new_zeros(()).expand(targets.shape)
    dlosses, dlse = dlosses.reshape(-1), None if dlse is None else dlse.reshape(-1)
    weights, numbers, present = _values(options, row_max)
    config = launch_config(logits.shape[-1], logits.dtype, options)
    block, vector = config["BLOCK"], config["VECTOR"]
    alike = all(n == 1 or a == b for n, a, b in zip(logits.shape, logits.stride(), dlogits.stride(), strict=True))
    shifted = alike and _is_shifted(logits, block, vector)
    if targets.numel() > 0:
        launch(
            cross_entropy_backward, targets.numel() * -(-(logits.shape[-1] + (vector - 1) * shifted) // block),
            dlosses, row_max if dlse is None else dlse, logits, targets, row_max, log_sum, dlogits, *weights,
            dlosses.stride(0), 0 if dlse is None else dlse.stride(0),
            logits.stride(0), logits.stride(1), dlogits.stride(0), dlogits.stride(1),
            logits.shape[1], logits.shape[2], options.ignore_index, *numbers, **present,
            DLSE=dlse is not None, SHIFTED=shifted, **config,
        )  # fmt: skip


@custom_op("cross_entropy")
def _cross_entropy(
    logits: Tensor,
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
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = LossOptions.of_schema(
        class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap,
        return_lse, return_accuracy, return_predictions,
    )  # fmt: skip
    targets = targets.contiguous()
    outputs = empty_outputs(targets, options)
    launch_forward(_as_batches(logits), targets, *outputs, options)
    return outputs


@_cross_entropy.register_fake
def _(logits, targets, *options_and_inplace):
    *options, _ = options_and_inplace
    return empty_outputs(targets, LossOptions.of_schema(*options))


@custom_op("cross_entropy_backward")
def _cross_entropy_backward(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    class_weights: Tensor | None,
    z_loss_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    batches = _as_batches(logits)
    dlogits = torch.empty(batches.shape, dtype=logits.dtype, device=logits.device)
    options = LossOptions.of_schema(class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap)
    launch_backward(dlosses, dlse, batches, targets, row_max, log_sum, dlogits, options)
    return dlogits.view(logits.shape)


@_cross_entropy_backward.register_fake
def _(dlosses, dlse, logits, *saved_and_options):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("cross_entropy_backward_", mutates_args=("logits",))
def _cross_entropy_backward_(
    dlosses: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    class_weights: Tensor | None,
    z_loss_tensor: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    batches = _as_batches(logits)
    options = LossOptions.of_schema(class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap)
    launch_backward(dlosses, dlse, batches, targets, row_max, log_sum, batches, options)
    if batches.data_ptr() != logits.data_ptr():
        logits.copy_(batches.view(logits.shape))


@_cross_entropy_backward_.register_fake
def _(*args):
    return None


def _save_for_backward(ctx, inputs, output) -> None:
    logits, targets, class_weights, z_loss_tensor, *numbers, return_lse, _, _, inplace_backward = inputs
    _, row_max, log_sum, predicted = output
    ctx.save_for_backward(logits, targets, row_max, log_sum, class_weights, z_loss_tensor)
    ctx.numbers, ctx.inplace_backward = numbers, inplace_backward
    ctx.set_materialize_grads(False)
    # Where lse is asked for, its gradient comes as that of log_sum: row_max counts as a constant there.
    ctx.mark_non_differentiable(row_max, predicted, *(() if return_lse else (log_sum,)))


def _backward(ctx, dlosses: Tensor | None, _, dlse: Tensor | None, __):
    saved = ctx.saved_tensors
    if dlosses is None and dlse is None:
        return (None,) * 12
    if ctx.inplace_backward:
        _cross_entropy_backward_(dlosses, dlse, *saved, *ctx.numbers)
        return saved[0], *(None,) * 11
    return _cross_entropy_backward(dlosses, dlse, *saved, *ctx.numbers), *(None,) * 11


# No autocast rule: PyTorch's op runs in float32 under autocast, and this one always does, without a float32 copy of the logits.
_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(
    _cross_entropy,
    _cross_entropy_backward,
    _cross_entropy_backward_,
)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    *,
    class_weights: Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predictions: bool = False,
    return_z_loss: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Negative log-likelihood of `targets` under softmax(logits), in float32.

    logits (..., V), targets (...) integers -> a scalar, or (...) with reduction="none"; a `CrossEntropyOutput` where lse,
    accuracy, predictions or the z-loss are asked for, which come from the same pass as the loss. Label smoothing as in Szegedy
    et al. 2016, section 7; z-loss adds z_loss * lse^2 (PaLM, section 5); softcap c turns a logit l into c tanh(l / c) (Gemma
    2, section 2). `class_weights` (V) as `weight` of PyTorch's: a token counts as much in its loss and in the mean as its
    target weighs, its z-loss included; where the weights sum up to 0 the mean is divided by 1. A z-loss that changes from call
    to call may be a tensor of shape (); as a float, too, it is compiled once.

    Ignored targets do not count in the mean; where nothing counts the mean is 0. The loss and the gradient of an ignored row
    are 0, whatever its logits hold; its lse (which passes no gradient on) and its prediction are those of its logits. Any other
    target outside of 0 to V - 1 makes the loss and the gradient of its row NaN, because checking it first would stall the GPU;
    its lse is that of its logits.
    A row with a NaN among its logits has the prediction -1 and counts as wrong.

    float32, float16, bfloat16, and float64 by the reference; logits of any strides, copied only where the elements of a row
    are not neighbours. The gradient is new memory. `inplace_backward` writes it over the logits instead, which saves as much
    as they take; it CORRUPTS every other reader of them after the backward pass, so pass it only where the logits are used
    nowhere else. ValueError: an argument has another shape, dtype, device or value than these.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: allowed is (..., V) with V of 1 or more")
    checks.check_dtype(checks.FLOATING, logits=logits)
    flags = (return_lse, return_accuracy, return_predictions, return_z_loss)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, class_weights, *flags)
    options.check(targets, logits.shape[:-1], logits.shape[-1], reduction, logits=logits)
    if inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("inplace_backward is True for expanded logits: allowed are logits each in memory of its own")
    if not use_triton(logits):
        return reference.cross_entropy(
            logits, targets, ignore_index, label_smoothing, z_loss, softcap, reduction, class_weights=class_weights,
            return_lse=return_lse, return_accuracy=return_accuracy,
            return_predictions=return_predictions, return_z_loss=return_z_loss,
        )  # fmt: skip
    options = options.without_dynamic_floats(logits)
    losses, row_max, log_sum, predicted = _cross_entropy(
        logits, targets, *options.of_loss(), *options.of_output(), inplace_backward
    )
    lse = row_max + log_sum if return_lse or return_z_loss else None
    return options.output(losses, targets, reduction, lse, predicted)


def _costs(itemsize: int, rows: int, vocab_size: int) -> Costs:
    # Read the logits; read them again and write their gradient. Targets are int64.
    elements = rows * vocab_size
    forward = Cost(elements * itemsize + 12 * rows, 4 * elements)
    return Costs.of(forward, Cost(2 * elements * itemsize + 16 * rows, 4 * elements))


EVERY_OPTION = {
    "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0,
    "return_lse": True, "return_accuracy": True, "return_predictions": True,
}  # fmt: skip


def _arguments(device: torch.device, dtype: torch.dtype, rows: int, vocab_size: int, every_option: bool = False) -> Arguments:
    targets = torch.randint(vocab_size, (rows,), device=device)
    options = {**EVERY_OPTION, "class_weights": torch.rand(vocab_size, device=device)} if every_option else {}
    return Arguments((draw(device, dtype, rows, vocab_size), targets), options)


record(
    Op(
        function=cross_entropy,
        reference=reference.cross_entropy,
        kernels=(cross_entropy_forward, cross_entropy_backward),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple({"rows": 8192, "vocab_size": vocab_size} for vocab_size in (128_256, 32_000, 50_304, 262_144)),
        examples=({"rows": 6, "vocab_size": 100}, {"rows": 5, "vocab_size": 37, "every_option": True}),
        # From Llama 2 and GPT-2, padded and as it is, to Gemma.
        compiled=tuple(
            grid(
                rows=(8192,),
                vocab_size=(32_000, 50_257, 50_304, 128_256, 262_144),
                every_option=(False, True),
                dtype=(torch.bfloat16, torch.float32),
            )
        ),
        baseline=lambda logits, targets: F.cross_entropy(logits.float(), targets),
        over="vocab_size",
        huge={"rows": 2**15 + 1, "vocab_size": 2**16},
    )
)
