"""Options of an attention call: the mask, the score function, the precision and the kernel choice."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from .choice import AttentionKernel

Precision = Literal["ieee", "tf32"]


@dataclass(frozen=True)
class Options:
    """The mask, the score function, the precision and the kernel choice of one call."""

    causal: bool
    scale: float
    """Factor of q k^T."""
    window: tuple[int, int] | None
    """Number of keys that a query sees before its own and, if not causal, after its own; -1 for all."""
    softcap: float | None
    """Maps a score s to softcap tanh(s / softcap)."""
    precision: Precision
    """Precision of float32 products: `tf32` rounds the factors to 10 mantissa bits."""
    kernel: AttentionKernel = "auto"
    """Kernels to run on Hopper."""
    begins: Tensor | None = None
    """(B, S) int32: begin of the document of each position. The last dimension is contiguous."""
    ends: Tensor | None = None
    """(B, S) int32: end of the document of each position, with the strides of `begins`."""

    lengths: Tensor | None = None
    """(B) int32: number of keys of each sequence; None for all S."""

    query_begins: Tensor | None = None
    """(B, S) int32: first query that sees each key. If given, begins and ends are (B, T), the interval of keys that each query
    sees, and there is no other mask."""
    query_ends: Tensor | None = None
    """(B, S) int32: end (exclusive) of the queries that see each key."""

    @property
    def document_stride(self) -> int:
        """Stride of the sequences in begins and ends."""
        return 0 if self.begins is None else self.begins.stride(0)

    def mask_tensors(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return begins, ends and lengths, with `unused` in place of each that is None; the kernels do not read it."""
        begins, ends, lengths = (unused if t is None else t for t in (self.begins, self.ends, self.lengths))
        return begins, ends, lengths

    def of_keys(self) -> "Options":
        """Return the options for the dK/dV kernel, whose begins and ends are the queries that see each key."""
        return self if self.query_begins is None else replace(self, begins=self.query_begins, ends=self.query_ends)

    def window_of(self, num_queries: int, num_keys: int) -> tuple[int, int]:
        """Return the window for the kernels, clamped to the number of tokens so that no sum with it overflows."""
        most = max(num_queries, num_keys)
        left, right = self.window or (0, 0)
        return most if left < 0 else min(left, most), most if right < 0 else min(right, most)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time constants of the kernels. Each combination compiles once."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "DOCUMENTS": 0 if self.begins is None else 1 if self.query_begins is None else 2,
            "LENGTHS": self.lengths is not None,
            "PRECISION": self.precision,
        }
