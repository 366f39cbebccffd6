"""What an attention call is asked to compute with its queries, keys and values."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Options:
    """The mask, the score function and the precision of one call."""

    causal: bool
    scale: float
    """Factor of q k^T."""
    window: int | None
    """Keys that a query sees, its own among them; to both sides where not causal."""
    softcap: float | None
    """Scores s become softcap tanh(s / softcap)."""
    precision: Precision
    """Of products of float32: `tf32` rounds the factors to 10 bits."""
    begins: Tensor | None = None
    """(B, S) int32: where the document of each position begins; its positions are neighbours in memory."""
    ends: Tensor | None = None
    """(B, S) int32: where it ends, laid out as `begins`."""

    @property
    def document_stride(self) -> int:
        """Distance of two sequences in begins and ends."""
        return 0 if self.begins is None else self.begins.stride(0)

    def documents(self, unused: Tensor) -> tuple[Tensor, Tensor]:
        """Return begins and ends, or twice a tensor that no kernel will read."""
        return (unused, unused) if self.begins is None or self.ends is None else (self.begins, self.ends)

    def window_of(self, num_queries: int, num_keys: int) -> int:
        """Return the window as kernels take it: no greater than what it can leave out, so that no sum with it overflows."""
        return 0 if self.window is None else min(self.window, max(num_queries, num_keys))

    def constants(self) -> dict[str, Any]:
        """Return what the kernels take as constants: each combination is compiled once."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "DOCUMENTS": self.begins is not None,
            "PRECISION": self.precision,
        }
