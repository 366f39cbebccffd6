"""The Transformer language model: its shape, its layers around the kernels, generation, and the accounting of what it costs."""

from .apply_to import Applied, apply_to
from .batching import BatchEngine, Generation
from .cache import KVCache
from .config import MODELS, ModelConfig
from .generate import generate
from .layers import GEGLU, CausalSelfAttention, LayerNorm, RMSNorm, SwiGLU
from .sampling import Sampling
from .transformer import TransformerLM

__all__ = [
    "GEGLU",
    "MODELS",
    "Applied",
    "BatchEngine",
    "CausalSelfAttention",
    "Generation",
    "KVCache",
    "LayerNorm",
    "ModelConfig",
    "RMSNorm",
    "Sampling",
    "SwiGLU",
    "TransformerLM",
    "apply_to",
    "generate",
]
