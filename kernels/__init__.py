"""Fused GPU ops as functions of tensors, each with a Triton kernel, a PyTorch reference, or both.

Independent of `nn.Module` and of the model package. `set_backend` selects the backend; the default runs Triton on CUDA tensors
and the reference elsewhere.
"""

from ..rope_scaling import RopeScaling
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
from .flash_reference import TiledAttention, tiled_attention
from .fp8_linear import fp8_linear
from .fp8_reference import AmaxHistory
from .geglu import geglu
from .grouped_linear import grouped_linear
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope, rope_qk, rope_qkv
from .rope_tables import rope_tables
from .swiglu import swiglu

__all__ = [
    "AmaxHistory",
    "CrossEntropyOutput",
    "Documents",
    "RopeScaling",
    "TiledAttention",
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
