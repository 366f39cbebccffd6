"""Patch a model of transformers with our kernels, one instance at a time; every patch can be reverted."""

from .apply_to import Applied, apply_to

__all__ = ["Applied", "apply_to"]
