"""What an attention call is asked to compute with its queries, keys and values."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from .choice import AttentionKernel

Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Options:
    """The mask, the score function and the precision of one call."""

    causal: bool
    scale: float
    """Factor of q k^T."""
    window: tuple[int, int] | None
    """How many keys a query sees before its own, and behind it, where not causal; -1 for all."""
    softcap: float | None
    """Scores s become softcap tanh(s / softcap)."""
    precision: Precision
    """Of products of float32: `tf32` rounds the factors to 10 bits."""
    kernel: AttentionKernel = "auto"
    """Which form of the kernels runs on Hopper."""
    begins: Tensor | None = None
    """(B, S) int32: where the document of each position begins; its positions are neighbours in memory."""
    ends: Tensor | None = None
    """(B, S) int32: where it ends, laid out as `begins`."""

    lengths: Tensor | None = None
    """(B) int32: how many keys each sequence has; None: all that there is memory for."""

    query_begins: Tensor | None = None
    """(B, S) int32: the first query that sees each key; then begins and ends (B, T) are the keys that each query sees, which
    is the whole mask."""
    query_ends: Tensor | None = None
    """(B, S) int32: the query after the last that sees it."""

    @property
    def document_stride(self) -> int:
        """Distance of two sequences in begins and ends."""
        return 0 if self.begins is None else self.begins.stride(0)

    def mask_tensors(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return begins, ends and lengths; a tensor that no kernel will read in the place of those that are None."""
        begins, ends, lengths = (unused if t is None else t for t in (self.begins, self.ends, self.lengths))
        return begins, ends, lengths

    def of_keys(self) -> "Options":
        """Return the options for a kernel that asks which queries see a key."""
        return self if self.query_begins is None else replace(self, begins=self.query_begins, ends=self.query_ends)

    def window_of(self, num_queries: int, num_keys: int) -> tuple[int, int]:
        """Return the window as kernels take it: no greater than what it can leave out, so that no sum with it overflows."""
        most = max(num_queries, num_keys)
        left, right = self.window or (0, 0)
        return most if left < 0 else min(left, most), most if right < 0 else min(right, most)

    def constants(self) -> dict[str, Any]:
        """Return what the kernels take as constants: each combination is compiled once."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "DOCUMENTS": 0 if self.begins is None else 1 if self.query_begins is None else 2,
            "LENGTHS": self.lengths is not None,
            "PRECISION": self.precision,
        }
