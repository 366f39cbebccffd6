"""Exact softmax attention that never holds the matrix of scores: forward, backward, and decoding from a cache."""

from .packing import Documents, documents
from .record import attention

__all__ = ["Documents", "attention", "documents"]
