"""Exact softmax attention that never holds the matrix of scores: forward, backward, and decoding from a cache."""

from .op import attention
from .packing import Documents, documents

__all__ = ["Documents", "attention", "documents"]
