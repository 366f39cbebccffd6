"""A sequence in parts, one for each of several processes: which positions are whose, and attention across the parts.

Context parallelism cuts a sequence into 2 cp pieces, of which process r has pieces r and 2 cp - 1 - r: under a causal mask all
processes then have the same number of pairs of queries and keys. Tensor parallelism cuts what a process has of it once more,
but only between the layers, where positions do not meet (Korthikanti et al. 2022).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import Documents, attention, documents
from .ring_attention import ring_attention


@dataclass(frozen=True)
class SequenceParts:
    """The part of this process."""

    tp_rank: int = 0
    tp: int = 1
    cp_rank: int = 0
    cp: int = 1
    cp_group: str = ""
    """The name of the group of processes that share a sequence, which has their cp ranks."""

    def in_attention(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the positions, along `dim`, whose queries and keys this process has."""
        if self.cp == 1:
            return x
        pieces = x.chunk(2 * self.cp, dim)
        return torch.cat([pieces[self.cp_rank], pieces[-1 - self.cp_rank]], dim)

    def between_layers(self, x: Tensor) -> Tensor:
        """Return the positions, along dimension 1, whose hidden states this process has."""
        return self.in_attention(x).chunk(self.tp, 1)[self.tp_rank]

    def documents(self, document_ids: Tensor) -> "Documents | tuple[Documents, ...]":
        """Return what `attention` wants to know of the documents, ids (B, T): computed once for many layers."""
        if self.cp == 1:
            return documents(document_ids)
        return tuple(documents(document_ids[:, :end]) for _, end in self._bounds(document_ids.shape[1]))

    def _bounds(self, length: int) -> list[tuple[int, int]]:
        piece = length // (2 * self.cp)
        return [(i * piece, (i + 1) * piece) for i in (self.cp_rank, 2 * self.cp - 1 - self.cp_rank)]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Any, window: int | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Causal attention of this process's queries (B, H, T / cp, K) to the keys and values of the whole sequence.

        k, v (B, Hkv, T / cp, K) are this process's; `packed` is what `documents` returns; further arguments are those of
        `kernels.attention`. A ring, unless documents or a window are masked: then each process gathers all keys and values.
        """
        if packed is None and window is None:
            return ring_attention(q, k, v, self.cp_group, scale, softcap)
        k, v = self._gathered(torch.stack([k, v])).unbind()
        options = {"window": window, "scale": scale, "softcap": softcap}
        outputs = []
        for i, (start, end) in enumerate(self._bounds(k.shape[2])):
            own = q[:, :, : end - start] if i == 0 else q[:, :, start - end :]
            # The queries are the last of so many positions.
            ids = None if packed is None else packed[i]
            outputs.append(attention(own, k[:, :, :end], v[:, :, :end], document_ids=ids, **options))
        return torch.cat(outputs, 2)

    def _gathered(self, kv: Tensor) -> Tensor:
        # (2, B, Hkv, T / cp, K) -> (2, B, Hkv, T, K) in the order of the sequence.
        from torch.distributed import _functional_collectives as collectives

        # The name of today is that of PyTorch 2.13.
        gather: Any = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
        gathered: Tensor = gather(kv.contiguous(), 0, self.cp_group)
        pieces = gathered.unflatten(0, (self.cp, 2)).chunk(2, 4)
        return torch.cat([*pieces[0].unbind(), *reversed(pieces[1].unbind())], 3)
