"""Sequences split between processes: the positions of each process, and attention across processes.

Context parallelism splits a sequence into 2 cp pieces. Process r holds the pieces r and 2 cp - 1 - r, so that under a causal
mask all processes have the same number of (query, key) pairs. Tensor parallelism splits a process's share again, but only
between attention layers, where positions are independent (Korthikanti et al. 2022).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import Documents, attention, documents
from .ring_attention import ring_attention


@dataclass(frozen=True)
class SequenceParts:
    """The tensor-parallel and context-parallel ranks of this process."""

    tp_rank: int = 0
    tp: int = 1
    cp_rank: int = 0
    cp: int = 1
    cp_group: str = ""
    """Name of the process group that shares a sequence; its ranks are the cp ranks."""

    def in_attention(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the positions along `dim` whose queries and keys this process holds."""
        if self.cp == 1:
            return x
        pieces = x.chunk(2 * self.cp, dim)
        return torch.cat([pieces[self.cp_rank], pieces[-1 - self.cp_rank]], dim)

    def between_layers(self, x: Tensor) -> Tensor:
        """Return the positions along dimension 1 whose hidden states this process holds."""
        return self.in_attention(x).chunk(self.tp, 1)[self.tp_rank]

    def documents(self, document_ids: Tensor) -> "Documents | tuple[Documents, ...]":
        """Return the `packed` argument of `attention` for document ids (B, T). Compute it once for all layers."""
        if self.cp == 1:
            return documents(document_ids)
        return tuple(documents(document_ids[:, :end]) for _, end in self._bounds(document_ids.shape[1]))

    def _bounds(self, length: int) -> list[tuple[int, int]]:
        piece = length // (2 * self.cp)
        return [(i * piece, (i + 1) * piece) for i in (self.cp_rank, 2 * self.cp - 1 - self.cp_rank)]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Any, window: int | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Causal attention of this process's queries (B, H, T / cp, K) over the keys and values of the entire sequence.

        k and v (B, Hkv, T / cp, K) are this process's share. `packed` is the result of `documents`. The other arguments are the
        same as in `kernels.attention`. Uses ring attention; with documents or a window, each process gathers all keys and
        values.
        """
        if packed is None and window is None:
            return ring_attention(q, k, v, self.cp_group, scale, softcap)
        k, v = self._gathered(torch.stack([k, v])).unbind()
        options = {"window": window, "scale": scale, "softcap": softcap}
        outputs = []
        for i, (start, end) in enumerate(self._bounds(k.shape[2])):
            own = q[:, :, : end - start] if i == 0 else q[:, :, start - end :]
            # The queries are the last of the first `end` positions.
            ids = None if packed is None else packed[i]
            outputs.append(attention(own, k[:, :, :end], v[:, :, :end], document_ids=ids, **options))
        return torch.cat(outputs, 2)

    def _gathered(self, kv: Tensor) -> Tensor:
        # (2, B, Hkv, T / cp, K) -> (2, B, Hkv, T, K), in sequence order.
        from torch.distributed import _functional_collectives as collectives

        # PyTorch 2.13 renamed the function.
        gather: Any = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
        gathered: Tensor = gather(kv.contiguous(), 0, self.cp_group)
        pieces = gathered.unflatten(0, (self.cp, 2)).chunk(2, 4)
        return torch.cat([*pieces[0].unbind(), *reversed(pieces[1].unbind())], 3)
