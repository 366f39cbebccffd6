"""Bits per byte: the loss per byte of text, which is comparable across tokenizers."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..tokenizer import AnyTokenizer


def token_sizes(tokenizer: AnyTokenizer) -> Tensor:
    """Return the number of text bytes in each token, int64 (vocab_size); special tokens have 0."""
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    special = set(tokenizer.special_tokens.values())
    for token, data in tokenizer.vocab.items():
        sizes[token] = 0 if token in special else len(data)
    return torch.from_numpy(sizes)


def bytes_per_token(batches: Iterable[Sequence[Tensor]], sizes: Tensor) -> float:
    """Return the mean bytes per target over batches (inputs, targets, ...), targets (B, T); negative targets are ignored."""
    num_bytes = num_tokens = 0
    for batch in batches:
        scored = batch[1][batch[1] >= 0]
        num_bytes += int(sizes[scored].sum())
        num_tokens += scored.numel()
    return num_bytes / num_tokens if num_tokens else 0.0


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Convert the nats of a text of `num_bytes` to bits per byte; NaN for an empty text."""
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan


def finite(value: float) -> float | None:
    """Return the value, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None
