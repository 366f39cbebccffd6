"""The cache of keys and values, for sequences of equal and of unequal length."""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .transformer import TransformerLM


class Places(NamedTuple):
    """Where new tokens stand, in sequences of unequal length."""

    positions: Tensor
    """(B, T) int64."""
    lengths: Tensor
    """(B) int32: tokens of each sequence, the new ones among them."""


class LayerCache:
    """Keys and values of the tokens that one layer has seen, in buffers of fixed `shape` (B, Hkv, tokens, K)."""

    places: Places | None = None
    """Where the next tokens stand; None: in every sequence after `length` others."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        *sizes, head_dim = shape
        # Each token on 16 bytes, as the kernels load them: else every step of decoding would copy the whole cache.
        padded = (*sizes, -(-head_dim // 8) * 8)
        self.k, self.v = (torch.empty(padded, dtype=dtype, device=device)[..., :head_dim] for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, Hkv, T, K) of new tokens; return those of all tokens so far.

        In sequences of unequal length those of a shorter one are followed by others, which are not its own.
        """
        start, self.length = self.length, self.length + k.shape[2]
        if self.places is None:
            self.k[:, :, start : self.length] = k
            self.v[:, :, start : self.length] = v
        else:
            # A full sequence is written over, so that there may be fewer tokens than were given.
            self.length = min(self.length, self.k.shape[2])
            index = self.places.positions[:, None, :, None].expand_as(k)
            self.k.scatter_(2, index, k.to(self.k.dtype))
            self.v.scatter_(2, index, v.to(self.v.dtype))
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def rows(self, start: int, lengths: Sequence[int]) -> "LayerCache":
        """Return the sequences from `start` on, one for each of `lengths`, its tokens; memory is shared."""
        view = copy(self)
        view.k, view.v = (x[start : start + len(lengths)] for x in (self.k, self.v))
        view.length, view.places = max(lengths), None
        return view


class KVCache:
    """The keys and values of every layer for up to `max_length` tokens of `batch_size` sequences, of unequal length too."""

    lengths: Tensor | None = None
    """(B) int64: tokens of each sequence, where they may differ."""

    def __init__(self, model: "TransformerLM", batch_size: int, max_length: int) -> None:
        config, weight = model.config, model.token_embeddings.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.compute_dtype or weight.dtype
        self.max_length = max_length
        shape = (batch_size, config.kv_heads, max_length, config.head_width)
        self.layers = [LayerCache(shape, dtype, weight.device) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far, by the longest sequence."""
        return self.layers[0].length

    def keep(self, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of sequence b, of which the others were padding; new ones come after these.

        From then on a sequence that is full overwrites its last token instead of raising an error, so that others can go on.
        """
        if max(lengths) > self.length or min(lengths) < 0:
            raise ValueError(f"lengths are {list(lengths)}: allowed is 0 to {self.length}, the tokens seen so far")
        self.lengths = torch.tensor(lengths, device=self.layers[0].k.device)
        for layer in self.layers:
            layer.length = max(lengths)

    def place(self, num_tokens: int) -> bool:
        """Say to each layer where the next tokens stand; return whether that differs between sequences."""
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
        """Return the sequences from `start` on, one for each of `lengths`, the tokens that it has; memory is shared.

        What is added to them is not counted here: whoever works on parts keeps count.
        """
        view = copy(self)
        view.layers = [layer.rows(start, lengths) for layer in self.layers]
        unequal = min(lengths) < max(lengths)
        view.lengths = torch.tensor(lengths, device=self.layers[0].k.device) if unequal else None
        return view

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of sequence `source` over those of sequence `target`."""
        for layer in self.layers:
            for x in (layer.k, layer.v):
                x[target, :, :length] = x[source, :, :length]
