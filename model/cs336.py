"""Conversion of state dicts between the names of Stanford's CS336, assignment 1, and the names of this package.

The course stores each projection under its own name. This package packs the projections of one input into one matrix (q, k
and v; W1 and W3) and pads the embedding and the head to `VOCABULARY_MULTIPLE` rows.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .config import VOCABULARY_MULTIPLE
from .layers import Embedding, Head, JoinedLinear

Module = TypeVar("Module", bound=nn.Module)

_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("w1", "w3")}
_RENAMED = {"down_proj": "w2", "up_proj": "w1"}
_PADDED = ("token_embeddings", "lm_head")


def from_cs336(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of this package from the course's weights of a `TransformerLM`, a block, or one of its layers.

    Names such as "layers.0.attn.q_proj.weight" may have any prefix. A feed-forward layer without w3 becomes a `SiLU` layer.
    Unknown names are kept. A projection without its partners is a `UserError`.
    """
    packed_name = {part: packed for packed, parts in _PACKED.items() for part in parts}
    new_name = {theirs: ours for ours, theirs in _RENAMED.items()}
    converted = {}
    for name, tensor in weights.items():
        prefix, layer, kind = _split(name)
        packed = packed_name.get(layer)
        if packed is None or (layer == "w1" and f"{prefix}w3.{kind}" not in weights):
            tensor = _padded(tensor) if layer in _PADDED else tensor
            converted[f"{prefix}{new_name.get(layer, layer)}.{kind}".lstrip(".")] = tensor
        elif f"{prefix}{packed}.{kind}" not in converted:
            parts = [f"{prefix}{part}.{kind}" for part in _PACKED[packed]]
            missing = [part for part in parts if part not in weights]
            if missing:
                raise UserError(f"the weights lack {', '.join(missing)}: expected all of {', '.join(parts)}")
            converted[f"{prefix}{packed}.{kind}"] = torch.cat([weights[part] for part in parts])
    return converted


def to_cs336(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module under the course's names: views of the parameters, without padding.

    `module` is a `TransformerLM`, a block, or one of its layers. Experts, which the course does not have, are a `UserError`.
    """
    converted = {}
    for name, tensor in module.state_dict().items():
        prefix, layer, kind = _split(name)
        owner = module.get_submodule(f"{prefix}{layer}")
        if layer in _PACKED:
            if not isinstance(owner, JoinedLinear):
                raise UserError(f"{name} holds the weights of experts: expected a model without experts")
            parts = zip(_PACKED[layer], tensor.split(owner.parts), strict=True)
            converted |= {f"{prefix}{part}.{kind}": piece for part, piece in parts}
        else:
            tensor = tensor[: owner.vocab_size] if isinstance(owner, Embedding | Head) else tensor
            converted[f"{prefix}{_RENAMED.get(layer, layer)}.{kind}".lstrip(".")] = tensor
    return converted


def load_cs336(module: Module, weights: Mapping[str, Tensor]) -> Module:
    """Load the course's weights into a module in place and return the module; names and shapes must match exactly."""
    expected = {name: tuple(tensor.shape) for name, tensor in to_cs336(module).items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*expected, *given]:
        if name not in given:
            raise UserError(f"the weights lack {name}: expected the shape {expected[name]}")
        if name not in expected:
            raise UserError(f"the weights contain {name}: expected {', '.join(expected)}")
        if given[name] != expected[name]:
            raise UserError(f"{name} has shape {given[name]}: expected {expected[name]}")
    module.load_state_dict(from_cs336(weights))
    return module


def _split(name: str) -> tuple[str, str, str]:
    # "layers.0.attn.q_proj.weight" -> ("layers.0.attn.", "q_proj", "weight").
    path, _, kind = name.rpartition(".")
    prefix, dot, layer = path.rpartition(".")
    return prefix + dot, layer, kind


def _padded(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, 0, 0, -len(weight) % VOCABULARY_MULTIPLE))
