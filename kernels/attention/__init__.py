"""Exact softmax attention without a stored score matrix: forward, backward, and decoding from a cache."""

from .choice import AttentionKernel, get_attention_kernel, set_attention_kernel, use_attention_kernel
from .packing import Documents, documents
from .record import attention

__all__ = [
    "AttentionKernel",
    "Documents",
    "attention",
    "documents",
    "get_attention_kernel",
    "set_attention_kernel",
    "use_attention_kernel",
]
