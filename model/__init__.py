"""The Transformer language model: its shape, its layers around the kernels, generation, and the accounting of what it costs."""

from .config import MODELS, ModelConfig
from .generate import generate
from .layers import GEGLU, CausalSelfAttention, LayerNorm, RMSNorm, SwiGLU
from .transformer import KVCache, TransformerLM

__all__ = [
    "GEGLU",
    "MODELS",
    "CausalSelfAttention",
    "KVCache",
    "LayerNorm",
    "ModelConfig",
    "RMSNorm",
    "SwiGLU",
    "TransformerLM",
    "generate",
]
