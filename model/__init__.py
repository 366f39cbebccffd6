"""The Transformer language model: configuration, layers around the kernels, generation, and cost accounting."""

from ..lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
