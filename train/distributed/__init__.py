"""The processes of a torchrun job, one per GPU: rendezvous, communication, agreed stops and errors."""

from ...lazy import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
