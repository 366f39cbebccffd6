"""The shape of a Transformer, and the shapes that have names."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from ..fields import check_fields
from ..kernels.rope_tables import RopeScaling

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding and the head come in multiples of this: whole tiles of a matrix product (Karpathy 2023, nanoGPT)."""

Norm = Literal["pre", "sandwich", "post", "none"]
NormType = Literal["rms_norm", "layer_norm"]
FeedForward = Literal["swiglu", "geglu_tanh", "geglu_erf", "silu"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: by default pre-norm RMSNorm, RoPE and SwiGLU, without biases."""

    vocab_size: int
    """Tokens that the embedding and the head know."""
    context_length: int
    """Tokens that the model sees at once."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Query heads."""
    d_ff: int
    """Inner width of the feed-forward layer; 8/3 d_model with a gate costs what 4 d_model costs without one."""
    num_kv_heads: int | None = None
    """Key-value heads (grouped-query attention); by default as many as num_heads."""
    head_dim: int | None = None
    """Width of a head; by default d_model / num_heads."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's weight."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalised, which bounds the scores of attention."""
    norm: Norm = "pre"
    """pre: each branch is norm-ed before it runs, and the last sum once more; sandwich: each branch after it ran too (Gemma 2,
    section 2); post: each sum with a branch is (Vaswani et al. 2017, section 3.1); none: nothing is."""
    rope: bool = True
    """Whether queries and keys are rotated by their position; without, only causality tells positions apart."""
    norm_type: NormType = "rms_norm"
    """What normalises the residual stream; layer_norm has a weight and no bias."""
    ffn: FeedForward = "swiglu"
    """Feed-forward layer. swiglu, geglu_tanh, geglu_erf: W2(act(W1 x) * W3 x), three matrices; silu: W2 silu(W1 x), two."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """How the rotary angles are stretched over a longer context than the model was first trained on."""
    rotary_dim: int | None = None
    """Channels of each head, from the first on, that are rotated; by default all."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen 2)."""
    window: int | None = None
    """Keys that a query of a local layer sees, its own among them; None: all layers are global."""
    window_pattern: str = "L"
    """Which layers are local (L) and which global (G), repeated over the layers: LLLLLG is Gemma 3's."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of local layers, which then are not scaled; by default as in the others."""
    attention_scale: float | None = None
    """Factor of the scores of attention; by default 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scores s of attention become softcap tanh(s / softcap) (Gemma 2, section 2)."""
    logit_softcap: float | None = None
    """Logits likewise."""
    unit_offset_norms: bool = False
    """Whether RMSNorm scales by 1 + weight, so that weights begin at 0 (Gemma)."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(d_model) (Vaswani et al. 2017, section 3.4)."""
    num_experts: int | None = None
    """Feed-forward layers, each of width d_ff, between which a router chooses for each token; None: one, for all tokens."""
    experts_per_token: int = 2
    """Experts that a token passes through."""
    normalise_expert_weights: bool = True
    """Whether the probabilities by which a token's experts are summed are divided by their sum (Mixtral)."""

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
                f"{self.d_model / self.num_heads:g}: a whole number is needed, or head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_kv_heads is {self.kv_heads}: it must divide num_heads, {self.num_heads}")
        self._check_rope()
        self._check_windows()
        self._check_experts()
        if self.unit_offset_norms and self.norm_type != "rms_norm":
            raise UserError(f"unit_offset_norms is set with norm_type {self.norm_type}: only rms_norm has them")

    def _check_rope(self) -> None:
        width, rotated = self.head_width, self.rotary_dim
        if width % 2 and rotated is None:
            raise UserError(f"the head dim is {width}: RoPE needs an even one")
        if rotated is not None:
            self._require("rotary_dim", 2 <= rotated <= width and rotated % 2 == 0, f"an even number from 2 to {width}")
        if self.rope_scaling.kind == "yarn":
            self._require("rope_theta", self.rope_theta > 1, "above 1 where rope_scaling.kind is yarn")

    def _check_windows(self) -> None:
        pattern = self.window_pattern
        if set(pattern) - set("LG") or not 0 < len(pattern) <= max(1, self.num_layers):
            raise UserError(f"window_pattern is {pattern!r}: it must be letters L and G, at most one for each layer")
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
        # The only weight would be 1, from which a router learns nothing.
        alone = self.experts_per_token == 1 and self.normalise_expert_weights
        self._require("normalise_expert_weights", not alone, "false where experts_per_token is 1")
        self._require("ffn", self.ffn != "silu", "swiglu, geglu_tanh or geglu_erf where there are experts")
        for name in ("d_model", "d_ff"):
            # Rows of 16 bytes, which the grouped products need.
            self._require(name, getattr(self, name) % 8 == 0, "a multiple of 8 where there are experts")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}: it must be {allowed}")

    @property
    def head_width(self) -> int:
        """Width of a head, resolved."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def q_width(self) -> int:
        """Width of the queries of all heads."""
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.kv_heads * self.head_width

    def is_local(self, layer: int) -> bool:
        """Return whether a layer sees a window only."""
        return self.window is not None and self.window_pattern[layer % len(self.window_pattern)] == "L"

    def window_of(self, layer: int) -> int | None:
        """Return the keys that a query of a layer sees, its own among them; None: all before it."""
        return self.window if self.is_local(layer) else None

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
