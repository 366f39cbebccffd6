"""Our kernels inside a model of Hugging Face's transformers: each part is replaced in one instance, and can be put back."""

from .apply import Applied, apply_to

__all__ = ["Applied", "apply_to"]
