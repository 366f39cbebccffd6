"""Cross-entropy of logits: launches, registered op and public function."""

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

# Columns of a block: 16 a thread, so that 32 bytes of half precision are in flight and few enough registers are used to fill
# a multiprocessor. A softcap needs more registers: programs are smaller then, and a thread loads 32 bytes of float32 too.
# Several options together would spill with more than one vector a thread.
MAX_BLOCK = 8192


def loss_launch_config(width: int, dtype: torch.dtype, options: LossOptions) -> dict[str, int]:
    """Return the column block, its 16-byte vectors and the warps for a vocabulary of `width`."""
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
    # (..., V) -> (outer, inner, V). With two row strides the usual shift, logits[:, :-1], needs no copy.
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() < 3:
        return logits.view(1, -1, logits.shape[-1])
    return logits.flatten(0, -3)


def empty_outputs(targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return uninitialized losses, row_max and log_sum, all (...) float32, and predicted.

    `row_max` is the greatest logit of a row, and lse = row_max + log_sum. They are stored separately, because lse alone is too
    coarse for the gradient. `predicted` is (...) int64 for predictions, (...) bool for the accuracy alone, else empty.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    shape = targets.shape if options.return_accuracy or options.return_predictions else 0
    dtype = torch.int64 if options.return_predictions else torch.bool
    return losses, torch.empty_like(losses), torch.empty_like(losses), torch.empty(shape, dtype=dtype, device=targets.device)


def _option_arguments(options: LossOptions, unused: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...], dict[str, Any]]:
    # Class weights and their sum (or unread tensors), the numeric options, and flags for the options in use.
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
    # Whether rows are wider than a block and begin between two vectors.
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
    weights, numbers, present = _option_arguments(options, losses)
    config = loss_launch_config(logits.shape[2], logits.dtype, options)
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
    """Run `launch_forward` and overwrite logits (1, N, V) with the gradient of the sum of the losses."""
    weights, numbers, present = _option_arguments(options, losses)
    launch(
        cross_entropy_fused, targets.numel(),
        logits, targets, losses, row_max, log_sum, predicted, *weights,
        logits.stride(1), logits.shape[2], options.ignore_index, *numbers,
        **present, **_flags(options), **loss_launch_config(logits.shape[2], logits.dtype, options),
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
    """Fill dlogits from logits, both (outer, inner, V); they may share memory. One of dlosses and dlse (...) may be None."""
    targets = targets.contiguous()
    if dlosses is None:
        dlosses = row_max.new_zeros(()).expand(targets.shape)
    dlosses, dlse = dlosses.reshape(-1), None if dlse is None else dlse.reshape(-1)
    weights, numbers, present = _option_arguments(options, row_max)
    config = loss_launch_config(logits.shape[-1], logits.dtype, options)
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
    options = LossOptions.from_schema(
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
    return empty_outputs(targets, LossOptions.from_schema(*options))


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
    options = LossOptions.from_schema(class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap)
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
    options = LossOptions.from_schema(class_weights, z_loss_tensor, ignore_index, label_smoothing, z_loss, softcap)
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
    # A gradient of lse = row_max + log_sum arrives as the gradient of log_sum; row_max counts as a constant.
    ctx.mark_non_differentiable(row_max, predicted, *(() if return_lse else (log_sum,)))


def _backward(ctx, dlosses: Tensor | None, _, dlse: Tensor | None, __):
    saved = ctx.saved_tensors
    if dlosses is None and dlse is None:
        return (None,) * 12
    if ctx.inplace_backward:
        _cross_entropy_backward_(dlosses, dlse, *saved, *ctx.numbers)
        return saved[0], *(None,) * 11
    return _cross_entropy_backward(dlosses, dlse, *saved, *ctx.numbers), *(None,) * 11


# No autocast rule: PyTorch's op runs in float32 under autocast. This op always does, without a float32 copy of the logits.
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
    """Return the negative log-likelihood of `targets` under softmax(logits), in float32.

    logits (..., V), targets (...) integers -> a scalar, or (...) with reduction="none". With one of the `return_` options the
    result is a `CrossEntropyOutput`, computed in the same pass as the loss. Label smoothing follows Szegedy et al. 2016,
    section 7. The z-loss adds z_loss * lse^2 (PaLM, section 5). A softcap c maps a logit l to c tanh(l / c) (Gemma 2,
    section 2). `class_weights` (V) is `weight` of PyTorch's op: the weight of the target multiplies the loss of a token, its
    z-loss included, and counts in the mean; if these weights sum to 0, the mean is divided by 1. A z-loss that changes from
    call to call may be a float or a tensor of shape (); both compile once.

    Ignored targets do not count in the mean; if nothing counts, the mean is 0. An ignored row has loss and gradient 0, even if
    its logits are not finite. Its prediction and its lse are computed from its logits, but its lse passes no gradient. Any
    other target outside 0 to V - 1 gives NaN in the loss and gradient of its row, because checking targets first would stall
    the GPU; its lse is computed from its logits. A row with a NaN among its logits has prediction -1 and counts as wrong.

    Supports float32, float16 and bfloat16; float64 runs the reference. Logits may have any strides; they are copied only if
    the elements of a row are not contiguous. The gradient is a new tensor. `inplace_backward` writes it over the logits
    instead and so saves their size. It CORRUPTS the logits for every other reader after the backward pass: use it only if
    nothing else reads them. Raises ValueError for an argument of another shape, dtype, device or value.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (..., V) with V of 1 or more")
    checks.check_dtype(checks.FLOATING, logits=logits)
    flags = (return_lse, return_accuracy, return_predictions, return_z_loss)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, class_weights, *flags)
    options.check(targets, logits.shape[:-1], logits.shape[-1], reduction, logits=logits)
    if inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("inplace_backward is True for expanded logits: expected logits that do not share memory")
    if not use_triton(logits):
        return reference.cross_entropy(
            logits, targets, ignore_index, label_smoothing, z_loss, softcap, reduction, class_weights=class_weights,
            return_lse=return_lse, return_accuracy=return_accuracy,
            return_predictions=return_predictions, return_z_loss=return_z_loss,
        )  # fmt: skip
    options = options.without_dynamic_floats(logits)
    losses, row_max, log_sum, predicted = _cross_entropy(
        logits, targets, *options.loss_arguments(), *options.output_arguments(), inplace_backward
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
        # Llama 2; GPT-2, unpadded and padded; Llama 3; Gemma.
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
