"""Bits per byte: a loss that compares across tokenizers, because it is of the text and not of its tokens."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..tokenizer import AnyTokenizer


def token_sizes(tokenizer: AnyTokenizer) -> Tensor:
    """Return the bytes of text that each token stands for, int64 (vocab_size); special tokens stand for none."""
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    special = set(tokenizer.special_tokens.values())
    for token, data in tokenizer.vocab.items():
        sizes[token] = 0 if token in special else len(data)
    return torch.from_numpy(sizes)


def bytes_per_token(batches: Iterable[Sequence[Tensor]], sizes: Tensor) -> float:
    """Return the mean size in bytes of the targets (B, T) of batches (inputs, targets, ...); negative ones do not count."""
    num_bytes = num_tokens = 0
    for batch in batches:
        scored = batch[1][batch[1] >= 0]
        num_bytes += int(sizes[scored].sum())
        num_tokens += scored.numel()
    return num_bytes / num_tokens if num_tokens else 0.0


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Return nats of text in bits per byte of it; NaN where it has no byte."""
    return nats / (math.log(2) * num_bytes) if num_bytes else math.nan


def finite(value: float) -> float | None:
    """Return the value, or None where JSON cannot hold it."""
    return value if math.isfinite(value) else None
