"""Cross-entropy: one online pass over the logits for the loss, one read and one write for their gradient.

The statistics of a row are kept per group of `VECTOR` neighbouring columns, which one thread loads at once: inside the loop
there is one exponential a logit, no barrier and no exchange between threads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import HAS_TRITON, jit, tl, use_triton
from .launch import launch
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .reference import CrossEntropyOutput as CrossEntropyOutput
from .reference import Reduction
from .registration import count_no_flops, custom_op
from .shared import tanh

# What the running maximum begins with: finite, so that a row that begins with -inf gives exp(-inf) and not NaN.
LOWEST: Any = tl.constexpr(torch.finfo(torch.float32).min) if HAS_TRITON else None


@jit
def _row_offset(row, inner_rows, outer_stride, inner_stride):
    return tl.cast(row // inner_rows, tl.int64) * outer_stride + tl.cast(row % inner_rows, tl.int64) * inner_stride


@jit
def _columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    return start + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@jit
def _add_block(
    row_ptr, start, end, target, target_logit, top, total, logit_sum, beaten,
    softcap: tl.constexpr, SMOOTHING: tl.constexpr, ACCURACY: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = _columns(start, BLOCK, VECTOR)
    if MASKED:
        x = tl.load(row_ptr + columns, mask=columns < end, other=-float("inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + columns).to(tl.float32)
    if ACCURACY:
        ahead = (x > target_logit) | ((x == target_logit) & (columns < target))
        beaten = tl.maximum(beaten, tl.max(ahead.to(tl.int32), axis=1))
    if softcap is not None:
        x = softcap * tanh(x * (1.0 / softcap))
        if MASKED:
            x = tl.where(columns < end, x, -float("inf"))
    if SMOOTHING:
        logit_sum += tl.sum(tl.where(columns < end, x, 0.0) if MASKED else x, axis=1)
    new_top = tl.maximum(top, tl.max(x, axis=1))
    total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top[:, None]), axis=1)
    return new_top, total, logit_sum, beaten


@jit
def _row_loss(
    row_ptr, target, counted, valid, width, read,
    label_smoothing: tl.constexpr, z_loss: tl.constexpr, softcap: tl.constexpr, ACCURACY: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    target_logit = tl.load(row_ptr + tl.where(valid, target, 0)).to(tl.float32)
    top = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK // VECTOR,), tl.float32)
    logit_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    beaten = tl.zeros((BLOCK // VECTOR,), tl.int32)
    end = tl.where(read, width, 0)
    whole = end // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        top, total, logit_sum, beaten = _add_block(
            row_ptr, start, end, target, target_logit, top, total, logit_sum, beaten,
            softcap, label_smoothing != 0.0, ACCURACY, BLOCK, VECTOR, False,
        )  # fmt: skip
    top, total, logit_sum, beaten = _add_block(
        row_ptr, whole, end, target, target_logit, top, total, logit_sum, beaten,
        softcap, label_smoothing != 0.0, ACCURACY, BLOCK, VECTOR, True,
    )  # fmt: skip
    row_top = tl.max(top, axis=0)
    log_total = tl.log(tl.sum(total * tl.exp(top - row_top), axis=0))
    if softcap is not None:
        target_logit = softcap * tanh(target_logit * (1.0 / softcap))
    # Logits relative to their maximum: a small loss does not suffer from large logits, as lse - target_logit would.
    loss = log_total - (1.0 - label_smoothing) * (target_logit - row_top)
    if label_smoothing != 0.0:
        loss -= label_smoothing * (tl.sum(logit_sum, axis=0) / width - row_top)
    if z_loss != 0.0:
        lse = row_top + log_total
        loss += z_loss * lse * lse
    loss = tl.where(valid, loss, float("nan"))
    return tl.where(counted, loss, 0.0), row_top, log_total, counted & valid & (tl.max(beaten, axis=0) == 0)


@jit
def _write_gradient(
    row_ptr, gradient_ptr, start, width, target, counted, top, log_total, scale,
    label_smoothing: tl.constexpr, z_loss: tl.constexpr, softcap: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # d loss / d logit_j = p_j - (1 - label_smoothing) [j = target] - label_smoothing / V + 2 z_loss lse p_j, and with a
    # softcap times 1 - tanh^2. Small differences come first. Ignored rows are not read.
    columns = _columns(start, BLOCK, VECTOR)
    if MASKED:
        x = tl.load(row_ptr + columns, mask=(columns < width) & counted, other=0.0).to(tl.float32)
    else:
        x = tl.load(row_ptr + columns, mask=counted, other=0.0).to(tl.float32)
    if softcap is not None:
        capped = tanh(x * (1.0 / softcap))
        x = softcap * capped
    probability = tl.exp(x - top - log_total)
    if label_smoothing != 0.0:
        others = label_smoothing / width
        gradient = probability - tl.where(columns == target, 1.0 - label_smoothing + others, others)
    else:
        gradient = probability - tl.where(columns == target, 1.0, 0.0)
    if z_loss != 0.0:
        gradient += 2.0 * z_loss * (top + log_total) * probability
    if softcap is not None:
        gradient *= 1.0 - capped * capped
    gradient = tl.where(counted, gradient * scale, 0.0).to(gradient_ptr.dtype.element_ty)
    if MASKED:
        tl.store(gradient_ptr + columns, gradient, mask=columns < width)
    else:
        tl.store(gradient_ptr + columns, gradient)


@jit
def _load_target(targets_ptr, row, ignore_index, width):
    target = tl.load(targets_ptr + row).to(tl.int64)
    valid = (target >= 0) & (target < width)
    # 32 bits, because every column is compared with it.
    return tl.where(valid, target, -1).to(tl.int32), target != ignore_index, valid


@jit
def cross_entropy_forward(
    logits_ptr, targets_ptr, losses_ptr, top_ptr, log_total_ptr, correct_ptr,
    logits_outer_stride, logits_inner_stride, inner_rows, width, ignore_index,
    label_smoothing: tl.constexpr, z_loss: tl.constexpr, softcap: tl.constexpr,
    READ_IGNORED: tl.constexpr, ACCURACY: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the loss of one row, and what its gradient is computed from."""
    row = tl.program_id(0)
    target, counted, valid = _load_target(targets_ptr, row, ignore_index, width)
    loss, top, log_total, correct = _row_loss(
        logits_ptr + _row_offset(row, inner_rows, logits_outer_stride, logits_inner_stride),
        target, counted, valid, width, True if READ_IGNORED else counted,
        label_smoothing, z_loss, softcap, ACCURACY, BLOCK, VECTOR,
    )  # fmt: skip
    tl.store(losses_ptr + row, loss)
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)
    if ACCURACY:
        tl.store(correct_ptr + row, correct)


@jit
def cross_entropy_backward(
    dlosses_ptr, logits_ptr, targets_ptr, top_ptr, log_total_ptr, dlogits_ptr,
    dlosses_stride, logits_outer_stride, logits_inner_stride, dlogits_outer_stride, dlogits_inner_stride,
    inner_rows, width, ignore_index,
    label_smoothing: tl.constexpr, z_loss: tl.constexpr, softcap: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block of columns of one row."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    target, counted, valid = _load_target(targets_ptr, row, ignore_index, width)
    top = tl.load(top_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    scale = tl.load(dlosses_ptr + tl.cast(row, tl.int64) * dlosses_stride)
    scale = tl.where(valid, scale, float("nan"))
    logits = logits_ptr + _row_offset(row, inner_rows, logits_outer_stride, logits_inner_stride)
    dlogits = dlogits_ptr + _row_offset(row, inner_rows, dlogits_outer_stride, dlogits_inner_stride)
    if start + BLOCK <= width:
        _write_gradient(logits, dlogits, start, width, target, counted, top, log_total, scale,
                        label_smoothing, z_loss, softcap, BLOCK, VECTOR, False)  # fmt: skip
    else:
        _write_gradient(logits, dlogits, start, width, target, counted, top, log_total, scale,
                        label_smoothing, z_loss, softcap, BLOCK, VECTOR, True)  # fmt: skip


@jit
def cross_entropy_fused(
    logits_ptr, targets_ptr, losses_ptr, top_ptr, log_total_ptr, correct_ptr, logits_row_stride, width, ignore_index,
    label_smoothing: tl.constexpr, z_loss: tl.constexpr, softcap: tl.constexpr,
    READ_IGNORED: tl.constexpr, ACCURACY: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the loss of one row, and the gradient in the place of its logits."""
    # The gradient takes the place of the logits that it is computed from; of a short row the L2 cache serves the second read.
    row = tl.program_id(0)
    target, counted, valid = _load_target(targets_ptr, row, ignore_index, width)
    logits = logits_ptr + tl.cast(row, tl.int64) * logits_row_stride
    loss, top, log_total, correct = _row_loss(
        logits, target, counted, valid, width, True if READ_IGNORED else counted,
        label_smoothing, z_loss, softcap, ACCURACY, BLOCK, VECTOR,
    )  # fmt: skip
    tl.store(losses_ptr + row, loss)
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)
    if ACCURACY:
        tl.store(correct_ptr + row, correct)
    scale = tl.where(valid, 1.0, float("nan"))
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _write_gradient(logits, logits, start, width, target, counted, top, log_total, scale,
                        label_smoothing, z_loss, softcap, BLOCK, VECTOR, False)  # fmt: skip
    _write_gradient(logits, logits, whole, width, target, counted, top, log_total, scale,
                    label_smoothing, z_loss, softcap, BLOCK, VECTOR, True)  # fmt: skip


# Columns of a block: 16 a thread, which is 32 bytes of half precision on their way and few enough registers to fill a
# multiprocessor. The tanh of a softcap needs more registers, so a thread has 8 columns then.
MAX_BLOCK = 8192


def launch_config(width: int, dtype: torch.dtype, softcap: float | None) -> dict[str, int]:
    """Return the block of columns, its vectors of 16 bytes and the warps that ship for a vocabulary of `width`."""
    block, thread_columns = (MAX_BLOCK, 16) if softcap is None else (MAX_BLOCK // 2, 8)
    block = min(max(1 << (width - 1).bit_length(), 1024), block)
    return {"BLOCK": block, "VECTOR": 16 // dtype.itemsize, "num_warps": block // (32 * thread_columns)}


def _as_batches(logits: Tensor) -> Tensor:
    # (..., V) -> (outer, inner, V). Two strides of rows let the usual shift, logits[:, :-1], pass without a copy.
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() < 3:
        return logits.view(1, -1, logits.shape[-1])
    return logits.flatten(0, -3)


def empty_outputs(targets: Tensor, return_accuracy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return uninitialised losses, top, log_total, all (...) float32, and correct (...) bool or (0).

    `top` is the greatest logit of a row and `log_total` the rest of its lse; their sum alone is too coarse for the gradient.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    correct = torch.empty(targets.shape if return_accuracy else 0, dtype=torch.bool, device=targets.device)
    return losses, torch.empty_like(losses), torch.empty_like(losses), correct


def launch_forward(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    top: Tensor,
    log_total: Tensor,
    correct: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
) -> None:
    """Fill losses, top, log_total and correct, all contiguous, from logits (outer, inner, V) and contiguous targets."""
    if targets.numel() > 0:
        launch(
            cross_entropy_forward, targets.numel(),
            logits, targets, losses, top, log_total, losses if correct is None else correct,
            logits.stride(0), logits.stride(1), logits.shape[1], logits.shape[2], ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            READ_IGNORED=return_lse, ACCURACY=correct is not None, **launch_config(logits.shape[2], logits.dtype, softcap),
        )  # fmt: skip


def launch_fused(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    top: Tensor,
    log_total: Tensor,
    correct: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
) -> None:
    """Do as `launch_forward` and overwrite logits (1, N, V) with the gradient of the sum of the losses."""
    launch(
        cross_entropy_fused, targets.numel(),
        logits, targets, losses, top, log_total, losses if correct is None else correct,
        logits.stride(1), logits.shape[2], ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        READ_IGNORED=return_lse, ACCURACY=correct is not None, **launch_config(logits.shape[2], logits.dtype, softcap),
    )  # fmt: skip


def launch_backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    top: Tensor,
    log_total: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Fill dlogits from logits, both (outer, inner, V); they may be one."""
    dlosses, targets = dlosses.reshape(-1), targets.contiguous()
    config = launch_config(logits.shape[-1], logits.dtype, softcap)
    if targets.numel() > 0:
        launch(
            cross_entropy_backward, targets.numel() * -(-logits.shape[-1] // config["BLOCK"]),
            dlosses, logits, targets, top, log_total, dlogits,
            dlosses.stride(0), logits.stride(0), logits.stride(1), dlogits.stride(0), dlogits.stride(1),
            logits.shape[1], logits.shape[2], ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, **config,
        )  # fmt: skip


@custom_op("cross_entropy")
def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    return_accuracy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batches, targets = _as_batches(logits), targets.contiguous()
    losses, top, log_total, correct = empty_outputs(targets, return_accuracy)
    launch_forward(
        batches, targets, losses, top, log_total, correct if return_accuracy else None,
        ignore_index, label_smoothing, z_loss, softcap, return_lse,
    )  # fmt: skip
    return losses, top, log_total, correct


@_cross_entropy.register_fake
def _(logits, targets, ignore_index, label_smoothing, z_loss, softcap, return_lse, return_accuracy, inplace_backward):
    return empty_outputs(targets, return_accuracy)


@custom_op("cross_entropy_backward")
def _cross_entropy_backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    top: Tensor,
    log_total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    batches = _as_batches(logits)
    dlogits = torch.empty(batches.shape, dtype=logits.dtype, device=logits.device)
    launch_backward(dlosses, batches, targets, top, log_total, dlogits, ignore_index, label_smoothing, z_loss, softcap)
    return dlogits.view(logits.shape)


@_cross_entropy_backward.register_fake
def _(dlosses, logits, targets, top, log_total, ignore_index, label_smoothing, z_loss, softcap):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("cross_entropy_backward_", mutates_args=("logits",))
def _cross_entropy_backward_(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    top: Tensor,
    log_total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    batches = _as_batches(logits)
    launch_backward(dlosses, batches, targets, top, log_total, batches, ignore_index, label_smoothing, z_loss, softcap)
    if batches.data_ptr() != logits.data_ptr():
        logits.copy_(batches.view(logits.shape))


@_cross_entropy_backward_.register_fake
def _(dlosses, logits, targets, top, log_total, ignore_index, label_smoothing, z_loss, softcap):
    return None


def _save_for_backward(ctx, inputs, output) -> None:
    logits, targets, *options, _, _, inplace_backward = inputs
    _, top, log_total, correct = output
    ctx.save_for_backward(logits, targets, top, log_total)
    ctx.options, ctx.inplace_backward = options, inplace_backward
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(top, log_total, correct)


def _backward(ctx, dlosses: Tensor, *_):
    saved = ctx.saved_tensors
    if ctx.inplace_backward:
        _cross_entropy_backward_(dlosses, *saved, *ctx.options)
        return saved[0], *(None,) * 8
    return _cross_entropy_backward(dlosses, *saved, *ctx.options), *(None,) * 8


# No autocast rule: PyTorch's op runs in float32 under autocast, and this one always does, without a float32 copy of the logits.
_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)


count_no_flops(
    _cross_entropy,
    _cross_entropy_backward,
    _cross_entropy_backward_,
)


def check_options(
    targets: Tensor, shape: torch.Size, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    """Refuse what no loss can be computed from; `shape` is that of the leading dimensions."""
    if targets.shape != shape:
        raise ValueError(f"targets has shape {tuple(targets.shape)}: allowed is {tuple(shape)}, the leading dimensions")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets has dtype {targets.dtype}: allowed are torch.int64 and torch.int32")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: allowed is 0 to 1")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}: allowed is 0 or more")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}: allowed is a number above 0, or None")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is unknown: choose 'none', 'mean' or 'sum'")


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse what the kernels do not compute in."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} has dtype {x.dtype}: allowed are torch.float32, torch.float16 and torch.bfloat16")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    *,
    return_lse: bool = False,
    return_accuracy: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Negative log-likelihood of `targets` under softmax(logits), in float32.

    logits (..., V), targets (...) integers -> a scalar, or (...) with reduction="none"; a `CrossEntropyOutput` where lse or
    accuracy are asked for. Ignored targets give 0 and do not count in the mean; where all are ignored the mean is 0. Any
    other target outside of 0 to V - 1 makes the loss and the gradient of its row NaN, because checking it first would stall
    the GPU. Label smoothing as in Szegedy et al. 2016, section 7; z-loss adds z_loss * lse^2 (PaLM, section 5); softcap c
    turns a logit l into c tanh(l / c) (Gemma 2, section 2). lse and accuracy come from the same pass as the loss.

    float32, float16, bfloat16; logits of any strides, copied only where the elements of a row are not neighbours. The
    gradient is new memory. `inplace_backward` writes it over the logits instead, which saves as much as they take; it
    CORRUPTS every other reader of them after the backward pass, so pass it only where the logits are used nowhere else.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: allowed is (..., V) with V of 1 or more")
    check_options(targets, logits.shape[:-1], label_smoothing, z_loss, softcap, reduction)
    if inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("inplace_backward is True for expanded logits: allowed are logits each in memory of its own")
    if not use_triton(logits):
        return reference.cross_entropy(
            logits, targets, ignore_index, label_smoothing, z_loss, softcap, reduction,
            return_lse=return_lse, return_accuracy=return_accuracy,
        )  # fmt: skip
    check_dtype("logits", logits)
    losses, top, log_total, correct = _cross_entropy(
        logits, targets, ignore_index, label_smoothing, z_loss, softcap, return_lse, return_accuracy, inplace_backward
    )
    return reference.reduce_losses(
        losses,
        targets != ignore_index,
        reduction,
        top + log_total if return_lse else None,
        correct if return_accuracy else None,
    )


def _costs(itemsize: int, rows: int, vocab_size: int) -> Costs:
    # Read the logits; read them again and write their gradient. Targets are int64.
    elements = rows * vocab_size
    forward = Cost(elements * itemsize + 12 * rows, 4 * elements)
    return Costs.of(forward, Cost(2 * elements * itemsize + 16 * rows, 4 * elements))


EVERY_OPTION = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "return_lse": True, "return_accuracy": True}


def _arguments(device: torch.device, dtype: torch.dtype, rows: int, vocab_size: int, every_option: bool = False) -> Arguments:
    targets = torch.randint(vocab_size, (rows,), device=device)
    return Arguments((draw(device, dtype, rows, vocab_size), targets), EVERY_OPTION if every_option else {})


record(
    Op(
        function=cross_entropy,
        reference=reference.cross_entropy,
        kernels=(cross_entropy_forward, cross_entropy_backward),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple({"rows": 8192, "vocab_size": vocab_size} for vocab_size in (128_256, 32_000, 50_304, 262_144)),
        examples=({"rows": 6, "vocab_size": 100},),
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
