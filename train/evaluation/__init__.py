"""Evaluate a trained model: bits per byte of texts, multiple choice, the CORE metric, and lm-eval tasks."""

from ...lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
