"""Supported model classes of transformers, and their differences. Does not import transformers."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from torch import nn

from ...errors import UserError


@dataclass(frozen=True)
class Family:
    """Class names of a family, and the details of its code."""

    name: str
    """Prefix of its classes: LlamaForCausalLM, LlamaRMSNorm, LlamaMLP, LlamaAttention."""
    window: Literal["none", "layer", "config"] = "layer"
    """Where attention finds the sliding window: nowhere, in the layer, or in the config."""
    unit_offset: bool = False
    """Whether norms scale by 1 + weight and round once, as in Gemma."""
    softcap: bool = False
    """Whether attention caps the scores."""
    base: str = "Model"
    """Suffix of the class that holds the layers without the head."""


FAMILIES = {
    f"{family.name}ForCausalLM": family
    for family in (
        Family("Llama", window="none"),
        Family("Mistral", window="config"),
        Family("Qwen2"),
        Family("Qwen3"),
        Family("Gemma2", unit_offset=True, softcap=True),
        Family("Gemma3", unit_offset=True, base="TextModel"),
    )
}


def transformers_class(module: nn.Module) -> type | None:
    """Return the transformers class of `module`, or None."""
    # FSDP2 replaces the class of a module with a subclass.
    return next((cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")), None)


def modeling_file(module: nn.Module) -> ModuleType:
    """Return the module file of transformers that defines the class of `module`."""
    cls = transformers_class(module)
    assert cls is not None
    return sys.modules[cls.__module__]


def find_model(model: nn.Module) -> tuple[nn.Module, Family]:
    """Return the language model that `model` is or wraps (PEFT), and its family."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        cls = transformers_class(module)
        if cls is not None and cls.__name__ in FAMILIES:
            if type(module).forward is not cls.forward:  # pyright: ignore[reportAttributeAccessIssue]
                raise UserError(f"{type(module).__name__} has its own forward pass: expected {cls.__name__}.forward")
            return module, FAMILIES[cls.__name__]
    raise UserError(f"the model is a {type(model).__name__}: expected one of {', '.join(FAMILIES)}, or a PEFT model of one")
