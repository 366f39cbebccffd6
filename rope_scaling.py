"""How RoPE's frequencies are scaled to a longer context. Imports no torch, so that configurations can hold these options."""

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

ScalingKind = Literal["default", "linear", "llama3", "yarn"]
# The options that each kind reads; setting any other option is an error.
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
    """Scaling of RoPE's frequencies; names and formulas follow Hugging Face's `rope_parameters`.

    - "linear": divides all frequencies by `factor` (position interpolation, Chen et al. 2023, eq. 4).
    - "llama3": divides low frequencies only (Grattafiori et al. 2024, section 3.4.1; the formula is in Meta's code):
      frequencies below `low_freq_factor` turns in the original context in full, up to `high_freq_factor` turns in part.
    - "yarn": divides low frequencies, with a ramp over the channels from `beta_fast` to `beta_slow` turns, and multiplies cos
      and sin by a factor (Peng et al. 2023, sections 3.2 to 3.4).

    Raises ValueError for an unknown kind, a number out of range, or an option that the kind does not read.
    """

    kind: ScalingKind = "default"
    factor: float = 1.0
    """New context divided by the original context, 1 or more."""
    original_max_position_embeddings: int | None = None
    """Context length in training. Required by llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: turns in the original context below which a frequency is divided in full."""
    high_freq_factor: float = 4.0
    """llama3: turns in the original context from which a frequency is unchanged."""
    beta_fast: float = 32.0
    """yarn: turns in the original context from which a frequency is unchanged."""
    beta_slow: float = 1.0
    """yarn: turns in the original context below which a frequency is divided in full."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim`, the attention factor is
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: float | None = None
    """yarn: see `mscale`."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; default: 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    truncate: bool = True
    """yarn: round the ends of the ramp outward to whole channels."""

    def __post_init__(self) -> None:
        if self.kind not in OPTIONS:
            *others, last = map(repr, OPTIONS)
            raise ValueError(f"kind is {self.kind!r}: choose {', '.join(others)} or {last}")
        read = OPTIONS[self.kind]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in read:
                raise ValueError(f"{field.name} is {value!r}: kind {self.kind!r} reads {', '.join(read) or 'no options'}")
        self._require("factor", _is_finite(self.factor) and self.factor >= 1, "a finite number, 1 or more")
        context = self.original_max_position_embeddings
        if "original_max_position_embeddings" in read:
            if context is None:
                raise ValueError(f"original_max_position_embeddings is None: kind {self.kind!r} requires it")
            is_length = isinstance(context, int) and not isinstance(context, bool) and context >= 1
            self._require("original_max_position_embeddings", is_length, "an integer, 1 or more")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ValueError(
                    f"{low} is {getattr(self, low)}, {high} {getattr(self, high)}: expected finite numbers above 0, the "
                    "second greater"
                )
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            self._require(name, value is None or (_is_finite(value) and value > 0), "a finite number above 0")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}: expected {expected}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < float(value) < math.inf
