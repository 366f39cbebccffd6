"""Kernels of both cross-entropies: one online pass over the logits for the loss, one read and one write for the gradient.

Row statistics are kept per group of `VECTOR` neighboring columns, which one thread loads at once. The inner loop therefore has
one exponential a logit, no barrier and no exchange between threads. Unused options compile away. Option values are run-time
arguments, so a schedule does not recompile.
"""

from typing import Any

import torch

from .dispatch import HAS_TRITON, jit, tl
from .shared import tanh

# Initial running maximum. Finite, so that a row that begins with -inf gives exp(-inf) instead of NaN.
LOWEST: Any = tl.constexpr(torch.finfo(torch.float32).min) if HAS_TRITON else None

# Arguments whose divisibility does not affect the width of loads.
SIZES = ("inner_rows", "ignore_index", "dlosses_stride", "dlse_stride")


@jit
def _row_offset(row, inner_rows, outer_stride, inner_stride):
    return tl.cast(row // inner_rows, tl.int64) * outer_stride + tl.cast(row % inner_rows, tl.int64) * inner_stride


@jit
def _columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    return start + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@jit
def _row_start(pointer, offset, SHIFTED: tl.constexpr, VECTOR: tl.constexpr):
    # Rows of an odd vocabulary begin anywhere in a 16-byte vector. Their blocks begin at the start of that vector, `shift`
    # columns before the row.
    shift = 0
    if SHIFTED:
        start = offset // VECTOR * VECTOR
        shift = tl.cast(offset - start, tl.int32)
        offset = start
    return pointer + offset, shift


@jit
def _whole_vectors(start, shift, end, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    first = start - shift + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR
    return (first >= 0) & (first + VECTOR <= end)


@jit
def _load_ends(
    row_ptr, start, shift, end, other: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    # Load the first block of a row, or the last one before `end`; complete vectors are loaded as vectors.
    places = _columns(start, BLOCK, VECTOR)
    if SHIFTED:
        whole = _whole_vectors(start, shift, end, BLOCK, VECTOR)
        part = (places >= shift) & (places < end + shift) & ~whole
        x = tl.load(row_ptr + places, mask=whole, other=other)
        x = tl.where(whole, x, tl.load(row_ptr + places, mask=part, other=other))
    else:
        x = tl.load(row_ptr + places, mask=places < end, other=other)
    return x


@jit
def _factor(z_loss, Z_LOSS: tl.constexpr):
    # A schedule may keep the factor on the device.
    if Z_LOSS == "tensor":
        z_loss = tl.load(z_loss).to(tl.float32)
    return z_loss


@jit
def _add_block(
    row_ptr, class_weights_ptr, start, shift, end, target, target_logit, softcap,
    row_max, row_sum, logit_sum, best_logit, best,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
    ACCURACY: tl.constexpr, PREDICTIONS: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = _columns(start, BLOCK, VECTOR) - shift
    inside = columns < end
    if SHIFTED:
        inside &= columns >= 0
    if MASKED:
        x = _load_ends(row_ptr, start, shift, end, -float("inf"), SHIFTED, BLOCK, VECTOR).to(tl.float32)
    else:
        x = tl.load(row_ptr + _columns(start, BLOCK, VECTOR)).to(tl.float32)
    if ACCURACY:
        # Whether a column beats the target; NaN does.
        ahead = ~(x <= target_logit) | ((x == target_logit) & (columns < target))
        best = tl.maximum(best, tl.max(ahead.to(tl.int32), axis=1))
    if PREDICTIONS:
        # Compare uncapped logits, because the cap rounds large ones to equal values. A NaN sets the prediction to -1.
        block_best = tl.max(x, axis=1)
        first = tl.min(tl.where(x == block_best[:, None], columns, 2147483647), axis=1)
        best = tl.where((block_best > best_logit) & (best >= 0), first, best)
        best = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, -1, best)
        best_logit = tl.maximum(best_logit, block_best)
    if SOFTCAP:
        x = softcap * tanh(x * (1.0 / softcap))
        if MASKED:
            x = tl.where(inside, x, -float("inf"))
    if SMOOTHING:
        term = tl.where(inside, x, 0.0) if MASKED else x
        if WEIGHTED:
            term *= tl.load(class_weights_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        logit_sum += tl.sum(term, axis=1)
    new_max = tl.maximum(row_max, tl.max(x, axis=1))
    row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(x - new_max[:, None]), axis=1)
    return new_max, row_sum, logit_sum, best_logit, best


@jit
def _row_loss(
    row_ptr, shift, class_weights_ptr, weight_sum_ptr, target, counted, valid, width, read, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
    ACCURACY: tl.constexpr, PREDICTIONS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    target_logit = tl.load(row_ptr + shift + tl.where(valid, target, 0)).to(tl.float32)
    row_max = tl.full((BLOCK // VECTOR,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    logit_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    best_logit = tl.full((BLOCK // VECTOR,), -float("inf"), tl.float32)
    best = tl.zeros((BLOCK // VECTOR,), tl.int32)
    end = tl.where(read, width, 0)
    whole = (end + shift) // BLOCK * BLOCK
    begin = 0
    if SHIFTED:
        begin = BLOCK
        whole = tl.maximum(whole, begin)
        row_max, row_sum, logit_sum, best_logit, best = _add_block(
            row_ptr, class_weights_ptr, 0, shift, end, target, target_logit, softcap,
            row_max, row_sum, logit_sum, best_logit, best,
            SMOOTHING, SOFTCAP, WEIGHTED, ACCURACY, PREDICTIONS, SHIFTED, BLOCK, VECTOR, True,
        )  # fmt: skip
    for start in range(begin, whole, BLOCK):
        row_max, row_sum, logit_sum, best_logit, best = _add_block(
            row_ptr, class_weights_ptr, start, shift, end, target, target_logit, softcap,
            row_max, row_sum, logit_sum, best_logit, best,
            SMOOTHING, SOFTCAP, WEIGHTED, ACCURACY, PREDICTIONS, SHIFTED, BLOCK, VECTOR, False,
        )  # fmt: skip
    row_max, row_sum, logit_sum, best_logit, best = _add_block(
        row_ptr, class_weights_ptr, whole, shift, end, target, target_logit, softcap,
        row_max, row_sum, logit_sum, best_logit, best,
        SMOOTHING, SOFTCAP, WEIGHTED, ACCURACY, PREDICTIONS, SHIFTED, BLOCK, VECTOR, True,
    )  # fmt: skip
    top = tl.max(row_max, axis=0)
    log_sum = tl.log(tl.sum(row_sum * tl.exp(row_max - top), axis=0))
    if SOFTCAP:
        target_logit = softcap * tanh(target_logit * (1.0 / softcap))
    # Subtract the maximum from logits first: lse - target_logit would lose a small loss among large logits.
    if WEIGHTED:
        weight = tl.load(class_weights_ptr + tl.where(valid, target, 0)).to(tl.float32)
    else:
        weight = 1.0
    if SMOOTHING:
        if WEIGHTED:
            weight_sum = tl.load(weight_sum_ptr)
            loss = (1.0 - label_smoothing) * weight * (log_sum - (target_logit - top))
            loss += label_smoothing / width * (weight_sum * log_sum - (tl.sum(logit_sum, axis=0) - weight_sum * top))
        else:
            loss = log_sum - (1.0 - label_smoothing) * (target_logit - top)
            loss -= label_smoothing * (tl.sum(logit_sum, axis=0) / width - top)
    else:
        loss = weight * (log_sum - (target_logit - top))
    if Z_LOSS is not None:
        lse = top + log_sum
        loss += weight * _factor(z_loss, Z_LOSS) * lse * lse
    loss = tl.where(counted, tl.where(valid, loss, float("nan")), 0.0)
    if PREDICTIONS:
        first = tl.min(tl.where(best_logit == tl.max(best_logit, axis=0), best, 2147483647), axis=0)
        answer = tl.where(tl.min(best, axis=0) < 0, -1, first)
    else:
        answer = counted & valid & (tl.max(best, axis=0) == 0)
    return loss, top, log_sum, answer


@jit
def _write_gradient(
    row_ptr, gradient_ptr, class_weights_ptr, start, shift, width, target, counted, row_max, log_sum, weight, weight_sum,
    dloss, dlse, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, DLSE: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # d loss / d logit_j = p_j - (1 - label_smoothing) [j = target] - label_smoothing / V + 2 z_loss lse p_j, with class
    # weights w (w_target p_j - ...) + label_smoothing / V (sum(w) p_j - w_j), and with a softcap times 1 - tanh^2;
    # d lse / d logit_j = p_j. Small differences are computed first, for accuracy. Ignored rows are not read.
    places = _columns(start, BLOCK, VECTOR)
    columns = places - shift
    inside = columns < width
    if SHIFTED:
        inside &= columns >= 0
    if MASKED and SHIFTED:
        x = _load_ends(row_ptr, start, shift, tl.where(counted, width, 0), 0.0, SHIFTED, BLOCK, VECTOR).to(tl.float32)
    elif MASKED:
        x = tl.load(row_ptr + places, mask=inside & counted, other=0.0).to(tl.float32)
    else:
        x = tl.load(row_ptr + places, mask=counted, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        capped = tanh(x * (1.0 / softcap))
        x = softcap * capped
        slope = 1.0 - capped * capped
    probability = tl.exp(x - row_max - log_sum)
    if SMOOTHING:
        others = label_smoothing / width
        if WEIGHTED:
            gradient = weight * (1.0 - label_smoothing) * (probability - tl.where(columns == target, 1.0, 0.0))
            class_weights = tl.load(class_weights_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            gradient += others * (weight_sum * probability - class_weights)
        else:
            gradient = probability - tl.where(columns == target, 1.0 - label_smoothing + others, others)
    else:
        gradient = probability - tl.where(columns == target, 1.0, 0.0)
        if WEIGHTED:
            gradient *= weight
    if Z_LOSS is not None:
        gradient += 2.0 * z_loss * weight * (row_max + log_sum) * probability
    if DLSE:
        gradient = gradient * dloss + dlse * probability
    if SOFTCAP:
        gradient *= slope
    if not DLSE:
        gradient *= dloss
    gradient = tl.where(counted, gradient, 0.0).to(gradient_ptr.dtype.element_ty)
    if MASKED and SHIFTED:
        whole = _whole_vectors(start, shift, width, BLOCK, VECTOR)
        tl.store(gradient_ptr + places, gradient, mask=whole)
        tl.store(gradient_ptr + places, gradient, mask=inside & ~whole)
    elif MASKED:
        tl.store(gradient_ptr + places, gradient, mask=inside)
    else:
        tl.store(gradient_ptr + places, gradient)


@jit
def _load_target(targets_ptr, row, ignore_index, width):
    target = tl.load(targets_ptr + row).to(tl.int64)
    valid = (target >= 0) & (target < width)
    # 32 bits, because every column is compared with it.
    return tl.where(valid, target, -1).to(tl.int32), target != ignore_index, valid


@jit
def _load_weights(
    class_weights_ptr, weight_sum_ptr, target, valid, SMOOTHING: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    weight, weight_sum = 1.0, 1.0
    if WEIGHTED:
        weight = tl.load(class_weights_ptr + tl.where(valid, target, 0)).to(tl.float32)
        if SMOOTHING:
            weight_sum = tl.load(weight_sum_ptr)
    return weight, weight_sum


@jit(do_not_specialize=SIZES)
def cross_entropy_forward(
    logits_ptr, targets_ptr, losses_ptr, row_max_ptr, log_sum_ptr, predicted_ptr, class_weights_ptr, weight_sum_ptr,
    logits_outer_stride, logits_inner_stride, inner_rows, width, ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
    READ_IGNORED: tl.constexpr, ACCURACY: tl.constexpr, PREDICTIONS: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the loss of one row, and the statistics for its gradient."""
    row = tl.program_id(0)
    target, counted, valid = _load_target(targets_ptr, row, ignore_index, width)
    offset = _row_offset(row, inner_rows, logits_outer_stride, logits_inner_stride)
    logits, shift = _row_start(logits_ptr, offset, SHIFTED, VECTOR)
    loss, row_max, log_sum, predicted = _row_loss(
        logits, shift, class_weights_ptr, weight_sum_ptr, target, counted, valid, width, True if READ_IGNORED else counted,
        label_smoothing, z_loss, softcap,
        SMOOTHING, Z_LOSS, SOFTCAP, WEIGHTED, ACCURACY, PREDICTIONS, SHIFTED, BLOCK, VECTOR,
    )  # fmt: skip
    tl.store(losses_ptr + row, loss)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if ACCURACY or PREDICTIONS:
        tl.store(predicted_ptr + row, predicted)


@jit(do_not_specialize=SIZES)
def cross_entropy_backward(
    dlosses_ptr, dlse_ptr, logits_ptr, targets_ptr, row_max_ptr, log_sum_ptr, dlogits_ptr, class_weights_ptr, weight_sum_ptr,
    dlosses_stride, dlse_stride, logits_outer_stride, logits_inner_stride, dlogits_outer_stride, dlogits_inner_stride,
    inner_rows, width, ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, DLSE: tl.constexpr,
    SHIFTED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block of columns of one row."""
    blocks = tl.cdiv(width + VECTOR - 1 if SHIFTED else width, BLOCK)
    row = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    target, counted, valid = _load_target(targets_ptr, row, ignore_index, width)
    weight, weight_sum = _load_weights(class_weights_ptr, weight_sum_ptr, target, valid, SMOOTHING, WEIGHTED)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    dloss = tl.load(dlosses_ptr + tl.cast(row, tl.int64) * dlosses_stride)
    dloss = tl.where(valid, dloss, float("nan"))
    dlse = 0.0
    if DLSE:
        dlse = tl.load(dlse_ptr + tl.cast(row, tl.int64) * dlse_stride)
    if Z_LOSS is not None:
        z_loss = _factor(z_loss, Z_LOSS)
    offset = _row_offset(row, inner_rows, logits_outer_stride, logits_inner_stride)
    logits, shift = _row_start(logits_ptr, offset, SHIFTED, VECTOR)
    if SHIFTED:
        # SHIFTED implies that logits and dlogits have the same strides.
        dlogits, _ = _row_start(dlogits_ptr, offset, SHIFTED, VECTOR)
    else:
        dlogits = dlogits_ptr + _row_offset(row, inner_rows, dlogits_outer_stride, dlogits_inner_stride)
    if (start >= shift) & (start + BLOCK <= width + shift):
        _write_gradient(
            logits, dlogits, class_weights_ptr, start, shift, width, target, counted, row_max, log_sum, weight, weight_sum,
            dloss, dlse, label_smoothing, z_loss, softcap,
            SMOOTHING, Z_LOSS, SOFTCAP, WEIGHTED, DLSE, SHIFTED, BLOCK, VECTOR, False,
        )  # fmt: skip
    else:
        _write_gradient(
            logits, dlogits, class_weights_ptr, start, shift, width, target, counted, row_max, log_sum, weight, weight_sum,
            dloss, dlse, label_smoothing, z_loss, softcap,
            SMOOTHING, Z_LOSS, SOFTCAP, WEIGHTED, DLSE, SHIFTED, BLOCK, VECTOR, True,
        )  # fmt: skip


@jit(do_not_specialize=SIZES)
def cross_entropy_fused(
    logits_ptr, targets_ptr, losses_ptr, row_max_ptr, log_sum_ptr, predicted_ptr, class_weights_ptr, weight_sum_ptr,
    logits_row_stride, width, ignore_index, label_smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr,
    READ_IGNORED: tl.constexpr, ACCURACY: tl.constexpr, PREDICTIONS: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the loss of one row, and overwrite its logits with their gradient."""
    # The L2 cache serves the second read of a short row.
    row = tl.program_id(0)
    target, counted, valid = _load_target(targets_ptr, row, ignore_index, width)
    logits = logits_ptr + tl.cast(row, tl.int64) * logits_row_stride
    loss, row_max, log_sum, predicted = _row_loss(
        logits, 0, class_weights_ptr, weight_sum_ptr, target, counted, valid, width, True if READ_IGNORED else counted,
        label_smoothing, z_loss, softcap,
        SMOOTHING, Z_LOSS, SOFTCAP, WEIGHTED, ACCURACY, PREDICTIONS, False, BLOCK, VECTOR,
    )  # fmt: skip
    tl.store(losses_ptr + row, loss)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if ACCURACY or PREDICTIONS:
        tl.store(predicted_ptr + row, predicted)
    weight, weight_sum = _load_weights(class_weights_ptr, weight_sum_ptr, target, valid, SMOOTHING, WEIGHTED)
    if Z_LOSS is not None:
        z_loss = _factor(z_loss, Z_LOSS)
    dloss = tl.where(valid, 1.0, float("nan"))
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _write_gradient(
            logits, logits, class_weights_ptr, start, 0, width, target, counted, row_max, log_sum, weight, weight_sum,
            dloss, 0.0, label_smoothing, z_loss, softcap,
            SMOOTHING, Z_LOSS, SOFTCAP, WEIGHTED, False, False, BLOCK, VECTOR, False,
        )  # fmt: skip
    _write_gradient(
        logits, logits, class_weights_ptr, whole, 0, width, target, counted, row_max, log_sum, weight, weight_sum,
        dloss, 0.0, label_smoothing, z_loss, softcap,
        SMOOTHING, Z_LOSS, SOFTCAP, WEIGHTED, False, False, BLOCK, VECTOR, True,
    )  # fmt: skip
