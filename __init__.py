"""Tilewright: Triton kernels, a Transformer, a tokenizer and a training loop, from raw text to generated text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model.apply_to import apply_to as apply_to

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch is imported by those who ask for it.
    if name == "apply_to":
        from .model.apply_to import apply_to

        return apply_to
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
