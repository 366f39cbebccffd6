"""AdamW on bfloat16 weights without a float32 copy, for all parameters in one launch.

Updates are computed in float32 and rounded stochastically. The random bits of an element depend only on the seed, the step, the
parameter and the element's index in it. They are therefore the same for every sharding along the first dimension, and after a
resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import jit, tl, use_triton
from .launch import launch
from .stochastic_rounding import (
    random_bits,
    random_bits_reference,
    round_stochastically,
    round_stochastically_reference,
    widen,
)

BLOCK = 1024
_FIELDS = 6


@jit
def _adamw_kernel(
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    table_ptr,
    rates_ptr,
    step_ptr,
    skip_ptr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    weight_decay,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(skip_ptr) != 0:
        return
    row = table_ptr + tl.program_id(0).to(tl.int64) * FIELDS
    weight_ptr = tl.load(row).to(tl.pointer_type(tl.int16))
    start, first, count = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    stream, seed = tl.load(row + 4), tl.load(row + 5)
    lr, bias1, bias2 = tl.load(rates_ptr), tl.load(rates_ptr + 1), tl.load(rates_ptr + 2)
    # Blocks begin at multiples of 4 in the full parameter, because Philox yields 4 numbers a call; shards begin anywhere.
    begin = first // 4 * 4
    local = begin + tl.arange(0, BLOCK) - first
    mask = (local >= 0) & (local < count)
    weight = widen(tl.load(weight_ptr + local, mask=mask, other=0))
    gradient = widen(tl.load(gradient_ptr + start + local, mask=mask, other=0))
    exp_avg = beta1 * tl.load(exp_avg_ptr + start + local, mask=mask, other=0.0) + rest1 * gradient
    exp_avg_sq = beta2 * tl.load(exp_avg_sq_ptr + start + local, mask=mask, other=0.0) + rest2 * (gradient * gradient)
    update = (exp_avg / bias1) / (tl.sqrt(exp_avg_sq / bias2) + eps)
    weight = weight * (1.0 - lr * weight_decay) - lr * update
    random = random_bits(seed.to(tl.uint64), stream, tl.load(step_ptr), begin, BLOCK)
    tl.store(weight_ptr + local, round_stochastically(weight, random), mask=mask)
    tl.store(exp_avg_ptr + start + local, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + start + local, exp_avg_sq, mask=mask)


@dataclass(frozen=True)
class RoundedWeights:
    """Contiguous bfloat16 tensors that `adamw_rounded_` updates together, with their offsets in their parameters.

    The moments and gradients of all tensors are concatenated in this order. `table` stores addresses: the tensors must not be
    reallocated.
    """

    weights: Sequence[Tensor]
    firsts: Sequence[int]
    """Index of each tensor's first element in its full parameter."""
    streams: Sequence[int]
    """Number of each parameter, which selects its random bits."""
    seed: int

    def __post_init__(self) -> None:
        for weight in self.weights:
            if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
                raise ValueError(f"weight has dtype {weight.dtype}, strides {weight.stride()}: expected contiguous bfloat16")

    def table(self) -> Tensor:
        """Return one int64 row per program, on the device: address, start, first index, count, stream, seed."""
        rows, start = [], 0
        for weight, first, stream in zip(self.weights, self.firsts, self.streams, strict=True):
            done = 0
            while done < weight.numel():
                index = first + done
                count = min(BLOCK - index % 4, weight.numel() - done)
                rows.append((weight.data_ptr() + 2 * done, start + done, index, count, stream, self.seed))
                done += count
            start += weight.numel()
        return torch.tensor(rows, dtype=torch.int64).view(-1, _FIELDS).to(self.weights[0].device)


def adamw_rounded_(
    of: RoundedWeights,
    table: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    skip: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update weights and moments in place (Loshchilov & Hutter 2019); do nothing where `skip` is true on the device.

    `gradient` is bfloat16 (n,), both moments are float32 (n,), concatenated over the weights. `table` is `of.table()`. `lr`
    float32, `step` float32 (from 1 on) and `skip` bool are scalars on the device.
    """
    # The learning rate and the bias corrections of both moments.
    rates = torch.stack([lr, *(1 - beta**step for beta in betas)])
    factors, count = (*betas, *(1 - beta for beta in betas)), step.long()
    if not use_triton(gradient):
        _adamw_reference_(of, gradient, exp_avg, exp_avg_sq, rates, count, skip, factors, eps, weight_decay)
        return
    launch(
        _adamw_kernel, len(table), gradient.view(torch.int16), exp_avg, exp_avg_sq, table, rates, count, skip, *factors, eps,
        weight_decay, FIELDS=_FIELDS, BLOCK=BLOCK,
    )  # fmt: skip
    torch.autograd.graph.increment_version(of.weights)


def _adamw_reference_(
    of: RoundedWeights,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rates: Tensor,
    step: Tensor,
    skip: Tensor,
    factors: tuple[float, ...],
    eps: float,
    weight_decay: float,
) -> None:
    (lr, bias1, bias2), (beta1, beta2, rest1, rest2) = rates, factors
    sizes = [weight.numel() for weight in of.weights]
    columns = (tensor.split(sizes) for tensor in (gradient, exp_avg, exp_avg_sq))
    for weight, first, stream, grad, mean, square in zip(of.weights, of.firsts, of.streams, *columns, strict=True):
        grad = grad.float()
        new_mean = beta1 * mean + rest1 * grad
        new_square = beta2 * square + rest2 * (grad * grad)
        update = (new_mean / bias1) / ((new_square / bias2).sqrt() + eps)
        stepped = weight.view(-1).float() * (1 - lr * weight_decay) - lr * update
        rounded = round_stochastically_reference(stepped, random_bits_reference(of.seed, stream, step, first, weight.numel()))
        weight.copy_(torch.where(skip, weight.view(-1), rounded).view_as(weight))
        mean.copy_(torch.where(skip, mean, new_mean))
        square.copy_(torch.where(skip, square, new_square))
