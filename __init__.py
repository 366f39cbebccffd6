"""Tilewright: Triton kernels, a Transformer, a tokenizer and a training loop, from raw text to generated text."""

from .lazy import attach_stub

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
