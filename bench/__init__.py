"""Benchmarks of the toolkit against its accounting, other libraries, and the limits of the hardware."""

from ..lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
