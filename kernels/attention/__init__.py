"""Exact softmax attention that never holds the matrix of scores: forward, backward, and decoding from a cache."""

from .documents import Documents, documents
from .op import attention

__all__ = ["Documents", "attention", "documents"]
