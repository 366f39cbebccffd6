"""Tables of cos and sin for `rope`, with the ways to stretch them over a longer context than a model was trained on."""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_int, check_number

ScalingKind = Literal["default", "linear", "llama3", "yarn"]
# The options that each kind reads; one that is set and not read is an error.
OPTIONS: dict[ScalingKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
        "truncate",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How angles are scaled for a longer context; names and formulas are those of Hugging Face's `rope_parameters`.

    - "linear": all frequencies are divided by `factor` (position interpolation, Chen et al. 2023, eq. 4).
    - "llama3": only low frequencies are (Grattafiori et al. 2024, section 3.4.1; the formula is in Meta's code): those that
      turn fewer than `low_freq_factor` times in the original context, and in part those below `high_freq_factor` times.
    - "yarn": likewise, with a ramp over the channels from `beta_fast` to `beta_slow` turns, and a factor on cos and sin
      (Peng et al. 2023, sections 3.2 to 3.4).

    ValueError: an unknown kind, a number outside its range, or an option that the kind does not read.
    """

    kind: ScalingKind = "default"
    factor: float = 1.0
    """New context over original context, 1 or more."""
    original_max_position_embeddings: int | None = None
    """Context in training. llama3 and yarn need it."""
    low_freq_factor: float = 1.0
    """llama3: turns in the original context below which a frequency is divided in full."""
    high_freq_factor: float = 4.0
    """llama3: turns from which it stays as it is."""
    beta_fast: float = 32.0
    """yarn: turns in the original context from which a frequency stays as it is."""
    beta_slow: float = 1.0
    """yarn: turns below which it is divided in full."""
    mscale: float | None = None
    """With `mscale_all_dim` too, the attention factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """What cos and sin are multiplied by; by default 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole channels."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(OPTIONS))
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in OPTIONS[self.kind]:
                raise ValueError(
                    f"{field.name} is {value!r}: kind {self.kind!r} reads {', '.join(OPTIONS[self.kind]) or 'none'}"
                )
        check_number("factor", self.factor, 1)
        if "original_max_position_embeddings" in OPTIONS[self.kind]:
            if self.original_max_position_embeddings is None:
                raise ValueError(f"original_max_position_embeddings is None: kind {self.kind!r} needs it")
            check_int("original_max_position_embeddings", self.original_max_position_embeddings, 1)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor}, high_freq_factor {self.high_freq_factor}: allowed are finite "
                "numbers above 0, the second greater"
            )
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"beta_slow is {self.beta_slow}, beta_fast {self.beta_fast}: allowed are finite numbers above 0, the second "
                "greater"
            )
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - kept) / scaling.factor + kept)


def _yarn(frequencies: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    def channel(turns: float) -> float:
        # The pair that turns so often in the original context (the solution of eq. 17 for d).
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

    Both are (num_positions, R / 2), float32, computed in float64. R is `rotary_dim`, the channels that are rotated, by default
    all `head_dim`. `scaling` stretches the angles over a longer context, and with kind "yarn" also multiplies cos and sin.

    ValueError: `head_dim` or `rotary_dim` is no even number, 2 or more and at most `head_dim`; `theta` is not above 0 and
    finite, or not above 1 with "yarn".
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    scaling = RopeScaling() if scaling is None else scaling
    if not isinstance(scaling, RopeScaling):
        raise ValueError(f"scaling is {scaling!r}: allowed is a RopeScaling, or None")
    check_int("num_positions", num_positions, 0)
    for name, dim, most in (("head_dim", head_dim, math.inf), ("rotary_dim", rotary_dim, head_dim)):
        check_int(name, dim, 2, most)
        if dim % 2:
            raise ValueError(f"{name} is {dim}: allowed is an even number")
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
