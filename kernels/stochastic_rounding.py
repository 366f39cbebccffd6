"""Stochastic rounding of float32 to bfloat16: the mean of the results is the value (Gupta et al. 2015).

The random bits come from Philox (Salmon et al. 2011), a function of a seed and a counter. The PyTorch reference gives the same
bits as the kernel. A bfloat16 is represented by the int16 of its bits, which Triton's interpreter supports.
"""

import torch
from torch import Tensor

from .dispatch import jit, tl

_ROUNDS, _LOW = 10, 0xFFFFFFFF
_MULTIPLIERS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


@jit
def widen(bits):
    """Return int16 bits of bfloat16 as float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def round_stochastically(x, random):
    """Round float32 `x` to bfloat16 by the low 16 bits of `random` (uint32); return the bits as int16."""
    # The low 16 bits are the distance from the next bfloat16 toward zero, in units of 2^-16 of the gap: adding 16 random bits
    # carries with that probability. Infinity has low bits of 0. A NaN could carry into the sign, so a fixed NaN replaces it.
    bits = x.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)
    return tl.where(x == x, bits >> 16, 0x7FC0).to(tl.int16)


@jit
def random_bits(seed, stream, step, first, BLOCK: tl.constexpr):
    """Return uint32 random bits for the BLOCK elements from `first` (a multiple of 4) of the tensor with number `stream`."""
    groups = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.int64)
    low, high = (groups & 0xFFFFFFFF).to(tl.uint32), (groups >> 32).to(tl.uint32)
    zeros = low * 0
    a, b, c, d = tl.philox(seed, low, high, zeros + stream.to(tl.uint32), zeros + step.to(tl.uint32))  # pyright: ignore[reportGeneralTypeIssues]
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


def random_bits_reference(seed: int, stream: int, step: Tensor, first: int, count: int) -> Tensor:
    """Return the same random bits for `count` elements from any `first` on, as int64; `step` is an int64 scalar."""
    elements = torch.arange(first, first + count, device=step.device)
    groups = elements // 4
    counter = [groups & _LOW, groups >> 32, torch.full_like(groups, stream), step.expand_as(groups)]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        (high_a, low_a), (high_b, low_b) = (_product(counter[2 * i], _MULTIPLIERS[i]) for i in range(2))
        counter = [high_b ^ counter[1] ^ key[0], low_b, high_a ^ counter[3] ^ key[1], low_a]
        key = [(word + step_of_key) & _LOW for word, step_of_key in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack(counter, dim=1).gather(1, (elements % 4)[:, None])[:, 0]


def round_stochastically_reference(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16 by the low 16 bits of `random` (int64)."""
    bits = x.view(torch.int32) + (random & 0xFFFF).int()
    return torch.where(x.isnan(), 0x7FC0, bits >> 16).to(torch.int16).view(torch.bfloat16)


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # The high and low 32 bits of a product of two 32-bit values. The factor is split, because the product overflows int64.
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
