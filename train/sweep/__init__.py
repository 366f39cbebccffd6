"""Sweeps: train at every point of a grid of options, and compare the results."""

from ...lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
