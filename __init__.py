"""Tilewright: Triton kernels, a Transformer, a tokenizer and a training loop, from raw text to generated text."""

__version__ = "0.1.0"
