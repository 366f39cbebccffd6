"""Exact softmax attention that never holds the matrix of scores: forward, backward, and decoding from a cache."""

from .record import attention

__all__ = ["attention"]
