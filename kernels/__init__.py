"""GPU maths on tensors: fused ops as plain functions, each with a Triton kernel or a PyTorch reference behind it.

Knows no module and no model. `set_backend` chooses what runs; by default Triton on CUDA tensors, else the reference.
"""

from .attention import attention
from .dispatch import get_backend, set_backend, use_backend
from .reference import cross_entropy, linear_cross_entropy, rope, swiglu
from .rms_norm import add_rms_norm, rms_norm

__all__ = [
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "get_backend",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "set_backend",
    "swiglu",
    "use_backend",
]
