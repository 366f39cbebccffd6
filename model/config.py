"""The shape of a Transformer, and the shapes that have names."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UserError

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding and the head come in multiples of this: whole tiles of a matrix product (Karpathy 2023, nanoGPT)."""

Norm = Literal["pre", "post", "none"]
NormType = Literal["rms_norm", "layer_norm"]
FeedForward = Literal["swiglu", "geglu_tanh", "geglu_erf", "silu"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer without biases: by default pre-norm RMSNorm, RoPE and SwiGLU."""

    vocab_size: int
    """Tokens that the embedding and the head know."""
    context_length: int
    """Tokens that the model sees at once."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Query heads; each is d_model / num_heads wide."""
    d_ff: int
    """Inner width of the feed-forward layer; 8/3 d_model with a gate costs what 4 d_model costs without one."""
    num_kv_heads: int | None = None
    """Key-value heads (grouped-query attention); by default as many as num_heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's weight."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalised, which bounds the scores of attention."""
    norm: Norm = "pre"
    """pre: each branch is norm-ed before it runs, and the last sum once more; post: each sum with a branch is (Vaswani et al.
    2017, section 3.1); none: nothing is."""
    rope: bool = True
    """Whether queries and keys are rotated by their position; without, only causality tells positions apart."""
    norm_type: NormType = "rms_norm"
    """What normalises the residual stream; layer_norm has a weight and no bias."""
    ffn: FeedForward = "swiglu"
    """Feed-forward layer. swiglu, geglu_tanh, geglu_erf: W2(act(W1 x) * W3 x), three matrices; silu: W2 silu(W1 x), two."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff", "kv_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: it must be a finite number above 0")
        for name, choices in (("norm", Norm), ("norm_type", NormType), ("ffn", FeedForward)):
            *others, last = get_args(choices)
            if getattr(self, name) not in (*others, last):
                raise UserError(f"{name} is {getattr(self, name)!r}: choose {', '.join(others)} or {last}")
        if self.d_model % self.num_heads or self.head_dim % 2:
            raise UserError(
                f"d_model {self.d_model} over num_heads {self.num_heads} gives a head dim of "
                f"{self.d_model / self.num_heads:g}: RoPE needs an even whole number"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_kv_heads is {self.kv_heads}: it must divide num_heads, {self.num_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head; those from vocab_size on are zero and stand for no token."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _gpt2(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
    # GPT-2's shapes as CS336 asks for them: SwiGLU with three matrices of 4 d_model, untied embeddings.
    return ModelConfig(50_257, 1024, d_model, num_layers, num_heads, d_ff=4 * d_model)


MODELS: dict[str, ModelConfig] = {
    "stories-cpu": ModelConfig(2048, 256, d_model=128, num_layers=4, num_heads=4, d_ff=320),
    "tinystories-17m": ModelConfig(10_000, 256, d_model=512, num_layers=4, num_heads=16, d_ff=1344),
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}
