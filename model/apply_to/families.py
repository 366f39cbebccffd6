"""Which models of transformers are known, and where they differ. Imports no transformers."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from torch import nn

from ...errors import UserError


@dataclass(frozen=True)
class Family:
    """The names of a family's classes, and the choices that its code makes."""

    name: str
    """That its classes begin with: LlamaForCausalLM, LlamaRMSNorm, LlamaMLP, LlamaAttention."""
    window: Literal["none", "layer", "config"] = "layer"
    """Where its attention finds the sliding window: nowhere, in itself, or in the config."""
    unit_offset: bool = False
    """Whether norms scale by 1 + weight and round once, as Gemma's do."""
    softcap: bool = False
    """Whether scores are capped."""
    base: str = "Model"
    """The end of the name of the class of the layers without a head."""


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
    """Return the class of transformers that `module` is an instance of, or None."""
    # FSDP2 gives a module a class of its own, which inherits from the module's.
    return next((cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")), None)


def modeling_file(module: nn.Module) -> ModuleType:
    """Return the file of transformers that defines the class of `module`."""
    cls = transformers_class(module)
    assert cls is not None
    return sys.modules[cls.__module__]


def find_model(model: nn.Module) -> tuple[nn.Module, Family]:
    """Return the language model that `model` is or wraps, as PEFT does, and its family."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        cls = transformers_class(module)
        if cls is not None and cls.__name__ in FAMILIES:
            if type(module).forward is not cls.forward:  # pyright: ignore[reportAttributeAccessIssue]
                raise UserError(f"{type(module).__name__} has a forward pass of its own: apply_to knows that of {cls.__name__}")
            return module, FAMILIES[cls.__name__]
    raise UserError(f"the model is a {type(model).__name__}: apply_to knows {', '.join(FAMILIES)}, and those that PEFT wraps")
