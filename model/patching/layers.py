"""Forward passes for norms and feed-forward layers."""

from functools import partial
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...kernels import geglu, rms_norm, swiglu
from .families import Family

ACTIVATIONS = {
    "silu": swiglu,
    "swish": swiglu,
    "gelu_pytorch_tanh": geglu,
    "gelu_new": geglu,
    "gelu": partial(geglu, approximate="none"),
}


def norm_forward(norm: Any, family: Family, hidden_states: Tensor) -> Tensor:
    """Normalize the last dimension: (..., D) -> (..., D)."""
    if family.unit_offset:
        return rms_norm(hidden_states, norm.weight, norm.eps, offset=1.0)
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon, casting="llama")


def mlp_forward(mlp: Any, activation: str, x: Tensor) -> Tensor:
    """Apply the gated feed-forward layer: (..., D) -> (..., D). The projections stay modules, which LoRA can wrap."""
    return mlp.down_proj(ACTIVATIONS[activation](mlp.gate_proj(x), mlp.up_proj(x)))


def activation_of(mlp: Any) -> str:
    """Return the name of the activation of a feed-forward layer; raise `UserError` if it has no kernel."""
    config = mlp.config
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS:
        raise UserError(f"the activation is {name!r}: expected one of {', '.join(ACTIVATIONS)}, or apply_to(..., mlp=False)")
    return name
