"""GPU maths on tensors: fused ops as plain functions, each with a Triton kernel or a PyTorch reference behind it.

Knows no module and no model. `set_backend` chooses what runs; by default Triton on CUDA tensors, else the reference.
"""

from .attention import (
    Documents,
    attention,
    documents,
    get_attention_kernel,
    set_attention_kernel,
    use_attention_kernel,
)
from .cross_entropy import CrossEntropyOutput, cross_entropy
from .dispatch import get_backend, set_backend, use_backend
from .flash_reference import tiled_attention
from .fp8_linear import fp8_linear
from .fp8_reference import AmaxHistory
from .geglu import geglu
from .grouped_linear import grouped_linear
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_qk, rope_qkv
from .rope_tables import RopeScaling, rope_tables
from .swiglu import swiglu

__all__ = [
    "AmaxHistory",
    "CrossEntropyOutput",
    "Documents",
    "RopeScaling",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "documents",
    "fp8_linear",
    "geglu",
    "get_attention_kernel",
    "get_backend",
    "grouped_linear",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_qk",
    "rope_qkv",
    "rope_tables",
    "set_attention_kernel",
    "set_backend",
    "swiglu",
    "tiled_attention",
    "use_attention_kernel",
    "use_backend",
]
