"""The shape of a Transformer, and the named shapes."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from ..fields import check_fields
from ..rope_scaling import RopeScaling

VOCABULARY_MULTIPLE = 128
"""The embedding and the head have a multiple of this many rows: whole tiles of a matrix product (Karpathy 2023, nanoGPT)."""

Norm = Literal["pre", "sandwich", "post", "none"]
NormType = Literal["rms_norm", "layer_norm"]
FeedForward = Literal["swiglu", "geglu_tanh", "geglu_erf", "silu"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only Transformer: by default pre-norm RMSNorm, RoPE and SwiGLU, without biases."""

    vocab_size: int
    """Number of tokens in the vocabulary."""
    context_length: int
    """Longest sequence, in tokens."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Number of Transformer blocks."""
    num_heads: int
    """Number of query heads."""
    d_ff: int
    """Inner width of the feed-forward layer; 8/3 d_model with a gate costs as much as 4 d_model without."""
    num_kv_heads: int | None = None
    """Number of key-value heads (grouped-query attention); by default num_heads."""
    head_dim: int | None = None
    """Width of a head; by default d_model / num_heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon that the norms add to the mean square or the variance."""
    tie_embeddings: bool = False
    """Whether the head shares the weight of the embedding."""
    qk_norm: bool = False
    """Whether attention normalizes the queries and keys of each head, which bounds the scores."""
    norm: Norm = "pre"
    """Position of the norms. pre: before each branch and after the last block; sandwich: also after each branch (Gemma 2,
    section 2); post: after each residual addition (Vaswani et al. 2017, section 3.1); none: no norms."""
    rope: bool = True
    """Whether attention rotates queries and keys by position; without RoPE, only the causal mask carries position."""
    norm_type: NormType = "rms_norm"
    """Norm of the residual stream; layer_norm has a weight and no bias."""
    ffn: FeedForward = "swiglu"
    """Feed-forward layer. swiglu, geglu_tanh, geglu_erf: W2(act(W1 x) * W3 x), three matrices; silu: W2 silu(W1 x), two."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """Scaling of the rotary angles to a context longer than in pre-training."""
    rotary_dim: int | None = None
    """Number of leading channels of each head that RoPE rotates; by default all."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen 2)."""
    window: int | None = None
    """Keys that a query of a local layer sees, including its own; None: all layers are global."""
    window_pattern: str = "L"
    """Local (L) and global (G) layers, repeated over the layers: LLLLLG is Gemma 3's pattern."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of local layers, without scaling; by default rope_theta with rope_scaling."""
    attention_scale: float | None = None
    """Scale of the attention scores; by default 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Cap of the attention scores: s becomes softcap tanh(s / softcap) (Gemma 2, section 2)."""
    logit_softcap: float | None = None
    """Cap of the logits, by the same formula."""
    unit_offset_norms: bool = False
    """Whether RMSNorm scales by 1 + weight, so that weights start at 0 (Gemma)."""
    scale_embeddings: bool = False
    """Whether the model multiplies embeddings by sqrt(d_model) (Vaswani et al. 2017, section 3.4)."""
    num_experts: int | None = None
    """Number of experts per feed-forward layer, each of width d_ff; a router selects some per token. None: one dense layer."""
    experts_per_token: int = 2
    """Number of experts that process each token."""
    normalise_expert_weights: bool = True
    """Whether the weights of a token's experts are divided by their sum (Mixtral)."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_kv_heads", "head_dim", "window"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("rope_theta", "norm_eps", "local_rope_theta", "attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            optional = name not in ("rope_theta", "norm_eps")
            self._require(name, optional if value is None else 0 < value < math.inf, "a finite number above 0")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise UserError(
                f"d_model {self.d_model} over num_heads {self.num_heads} gives a head dim of "
                f"{self.d_model / self.num_heads:g}: expected a whole number; change one of them or set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_kv_heads is {self.kv_heads}: expected a divisor of num_heads, {self.num_heads}")
        self._check_rope()
        self._check_windows()
        self._check_experts()
        if self.unit_offset_norms and self.norm_type != "rms_norm":
            raise UserError(f"unit_offset_norms is set with norm_type {self.norm_type}: only rms_norm supports it")

    def _check_rope(self) -> None:
        width, rotated = self.head_width, self.rotary_dim
        if width % 2 and rotated is None:
            raise UserError(f"the head dim is {width}: RoPE needs an even width")
        if rotated is not None:
            self._require("rotary_dim", 2 <= rotated <= width and rotated % 2 == 0, f"an even number from 2 to {width}")
        if self.rope_scaling.kind == "yarn":
            self._require("rope_theta", self.rope_theta > 1, "above 1 with rope_scaling.kind yarn")

    def _check_windows(self) -> None:
        pattern = self.window_pattern
        if set(pattern) - set("LG") or not 0 < len(pattern) <= max(1, self.num_layers):
            raise UserError(f"window_pattern is {pattern!r}: expected letters L and G, at most one per layer")
        for name, idle in (("window_pattern", "L"), ("local_rope_theta", None)):
            if self.window is None and getattr(self, name) != idle:
                raise UserError(f"{name} is {getattr(self, name)} without a window: set window too")

    def _check_experts(self) -> None:
        if self.num_experts is None:
            for name, idle in (("experts_per_token", 2), ("normalise_expert_weights", True)):
                if getattr(self, name) != idle:
                    raise UserError(f"{name} is {getattr(self, name)} without experts: set num_experts too")
            return
        self._require("num_experts", self.num_experts >= 1, "at least 1")
        most = self.num_experts
        self._require("experts_per_token", 1 <= self.experts_per_token <= most, f"from 1 to num_experts, {most}")
        # The only weight would be 1, and the router would get no gradient.
        alone = self.experts_per_token == 1 and self.normalise_expert_weights
        self._require("normalise_expert_weights", not alone, "false with experts_per_token 1")
        self._require("ffn", self.ffn != "silu", "swiglu, geglu_tanh or geglu_erf with experts")
        for name in ("d_model", "d_ff"):
            # The grouped products need rows of 16 bytes.
            self._require(name, getattr(self, name) % 8 == 0, "a multiple of 8 with experts")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}: expected {allowed}")

    @property
    def head_width(self) -> int:
        """Width of a head, after the default."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads, after the default."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def q_width(self) -> int:
        """Total width of the queries of all heads."""
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Total width of the keys of all heads, and of the values."""
        return self.kv_heads * self.head_width

    def is_local(self, layer: int) -> bool:
        """Return whether a layer attends within a window."""
        return self.window is not None and self.window_pattern[layer % len(self.window_pattern)] == "L"

    def window_of(self, layer: int) -> int | None:
        """Return how many keys a query of a layer sees, including its own; None: all keys up to its own."""
        return self.window if self.is_local(layer) else None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head; rows from vocab_size on are zero padding."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def pad_vocabulary(config: ModelConfig, multiple: int) -> ModelConfig:
    """Return the shape with its vocabulary rounded up: GPT-2's 50,257 becomes 50,304 for a multiple of 64 or 128."""
    if multiple < 1:
        raise UserError(f"the vocabulary multiple is {multiple}: expected at least 1")
    return dataclasses.replace(config, vocab_size=-(-config.vocab_size // multiple) * multiple)


def _gpt2(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
    # GPT-2's shapes as CS336 defines them: SwiGLU with three matrices of 4 d_model, untied embeddings.
    return ModelConfig(50_257, 1024, d_model, num_layers, num_heads, d_ff=4 * d_model)


MODELS: dict[str, ModelConfig] = {
    "stories-cpu": ModelConfig(2048, 256, d_model=128, num_layers=4, num_heads=4, d_ff=320),
    "tinystories-17m": ModelConfig(10_000, 256, d_model=512, num_layers=4, num_heads=16, d_ff=1344),
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}
"""Shape of each preset, by name."""
