"""Hugging Face folders, as `transformers` and most inference servers read them: `config.json` and safetensors."""

from ...lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
