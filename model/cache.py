"""The key-value cache, for sequences of equal or unequal length."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .transformer import TransformerLM


class Places(NamedTuple):
    """Positions of new tokens in sequences of unequal length."""

    positions: Tensor
    """(B, T) int64: position of each new token."""
    lengths: Tensor
    """(B) int32: number of tokens of each sequence, including the new ones."""


class LayerCache:
    """Keys and values of one layer, in preallocated buffers of `shape` (B, Hkv, tokens, K)."""

    places: Places | None = None
    """Positions of the next tokens; None: after the first `length` tokens of every sequence."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        *sizes, head_dim = shape
        # The kernels need 16-byte aligned tokens; without the padding each decoding step would copy the entire cache.
        padded = (*sizes, -(-head_dim // 8) * 8)
        self.k, self.v = (torch.empty(padded, dtype=dtype, device=device)[..., :head_dim] for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values (B, Hkv, T, K) of new tokens; return the keys and values of all tokens so far.

        With sequences of unequal length, the rows of a shorter sequence end with unspecified values.
        """
        start, self.length = self.length, self.length + k.shape[2]
        if self.places is None:
            self.k[:, :, start : self.length] = k
            self.v[:, :, start : self.length] = v
        else:
            # A full sequence overwrites its last token, so the length may grow by less than T.
            self.length = min(self.length, self.k.shape[2])
            index = self.places.positions[:, None, :, None].expand_as(k)
            self.k.scatter_(2, index, k.to(self.k.dtype))
            self.v.scatter_(2, index, v.to(self.v.dtype))
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def rows(self, start: int, lengths: Sequence[int]) -> "LayerCache":
        """Return a view of the sequences from `start` on; `lengths` are their numbers of tokens."""
        view = copy(self)
        view.k, view.v = (x[start : start + len(lengths)] for x in (self.k, self.v))
        view.length, view.places = max(lengths), None
        return view


class KVCache:
    """The keys and values of every layer for `batch_size` sequences of up to `max_length` tokens each."""

    lengths: Tensor | None = None
    """(B) int64: number of tokens of each sequence; None if all sequences have the same length."""

    def __init__(self, model: "TransformerLM", batch_size: int, max_length: int) -> None:
        config, weight = model.config, model.token_embeddings.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.compute_dtype or weight.dtype
        self.max_length = max_length
        shape = (batch_size, config.kv_heads, max_length, config.head_width)
        self.layers = [LayerCache(shape, dtype, weight.device) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return self.layers[0].length

    def keep(self, lengths: Sequence[int]) -> None:
        """Truncate sequence b to its first lengths[b] tokens, for example to drop padding. New tokens follow these.

        Afterwards a full sequence overwrites its last token instead of raising an error, so that the others can continue.
        """
        if max(lengths) > self.length or min(lengths) < 0:
            raise ValueError(f"lengths are {list(lengths)}: expected 0 to {self.length}, the number of cached tokens")
        self.lengths = torch.tensor(lengths, device=self.layers[0].k.device)
        for layer in self.layers:
            layer.length = max(lengths)

    def place(self, num_tokens: int) -> bool:
        """Set the positions of the next `num_tokens` tokens in each layer; return whether they differ between sequences."""
        if self.lengths is None:
            return False
        positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        positions = positions.clamp(max=self.max_length - 1)
        self.lengths = positions[:, -1] + 1
        places = Places(positions, self.lengths.to(torch.int32))
        for layer in self.layers:
            layer.places = places
        return True

    def rows(self, start: int, lengths: Sequence[int]) -> "KVCache":
        """Return a view of the sequences from `start` on; `lengths` are their numbers of tokens.

        Appending to the view does not update the lengths of this cache: the caller keeps count.
        """
        view = copy(self)
        view.layers = [layer.rows(start, lengths) for layer in self.layers]
        unequal = min(lengths) < max(lengths)
        view.lengths = torch.tensor(lengths, device=self.layers[0].k.device) if unequal else None
        return view

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of sequence `source` to sequence `target`."""
        for layer in self.layers:
            for x in (layer.k, layer.v):
                x[target, :, :length] = x[source, :, :length]
