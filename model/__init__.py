"""The Transformer language model: its shape, its layers around the kernels, generation, and the accounting of what it costs."""

from .config import MODELS, ModelConfig
from .generate import generate
from .layers import CausalSelfAttention, RMSNorm, SwiGLU
from .transformer import KVCache, TransformerLM

__all__ = [
    "MODELS",
    "CausalSelfAttention",
    "KVCache",
    "ModelConfig",
    "RMSNorm",
    "SwiGLU",
    "TransformerLM",
    "generate",
]
