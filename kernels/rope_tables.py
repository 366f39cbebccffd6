"""Tables of cos and sin for `rope`, optionally scaled to a longer context than the model was trained on."""

import math

import torch
from torch import Tensor

from ..rope_scaling import RopeScaling
from .checks import check_int, check_number


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - kept) / scaling.factor + kept)


def _yarn(frequencies: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    def channel(turns: float) -> float:
        # The index of the pair with this many turns over the original context (eq. 17 solved for d).
        assert scaling.original_max_position_embeddings is not None
        wavelength = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return rotary_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64, device=frequencies.device)
    interpolated = ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    return frequencies * (interpolated / scaling.factor + 1 - interpolated)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    numerator, denominator = 1.0, 0.0
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        numerator, denominator = scaling.mscale, scaling.mscale_all_dim
    return (0.1 * numerator * math.log(scaling.factor) + 1) / (0.1 * denominator * math.log(scaling.factor) + 1)


def rope_tables(
    head_dim: int,
    num_positions: int,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
    *,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angle position * theta^(-2i / R) of each pair i of channels (Su et al. 2021, eq. 15).

    Both are (num_positions, R / 2), float32, computed in float64. R is `rotary_dim`, the number of rotated channels; default
    `head_dim`. `scaling` adapts the angles to a longer context; kind "yarn" also multiplies cos and sin.

    Raises ValueError unless `head_dim` and `rotary_dim` are even, 2 or more and at most `head_dim`, and `theta` is finite and
    above 0 (above 1 for "yarn").
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    scaling = RopeScaling() if scaling is None else scaling
    if not isinstance(scaling, RopeScaling):
        raise ValueError(f"scaling is {scaling!r}: expected a RopeScaling or None")
    check_int("num_positions", num_positions, 0)
    for name, dim, most in (("head_dim", head_dim, math.inf), ("rotary_dim", rotary_dim, head_dim)):
        check_int(name, dim, 2, most)
        if dim % 2:
            raise ValueError(f"{name} is {dim}: expected an even number")
    least = 1 if scaling.kind == "yarn" else 0
    check_number("theta", theta, above=least)
    frequencies = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _yarn(frequencies, rotary_dim, theta, scaling)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64, device=device), frequencies)
    factor = _attention_factor(scaling)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()
