"""Model families that can be read and written, and how their blocks differ from Llama's."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import UserError
from ..config import ModelConfig

Windows = Literal["none", "all", "last", "alternating", "pattern"]

# Fields of `ModelConfig` that every family supports with any value.
_SHARED_FIELDS = {
    "vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff", "num_kv_heads", "head_dim", "rope_theta",
    "norm_eps", "tie_embeddings", "rope_scaling",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Properties shared by the models of one `model_type`, and the fields that each `config.json` sets."""

    model_type: str
    architecture: str
    """Name of the class in transformers."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` with a value fixed by the family, other than the default."""
    optional: frozenset[str] = frozenset()
    """Fields of `ModelConfig`, beyond `_SHARED_FIELDS`, that `config.json` sets."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of transformers for fields that `config.json` omits."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `config.json` for which our blocks support only this value."""
    windows: Windows = "none"
    """Which layers have a window, if `config.json` does not list them."""

    @property
    def is_mixture(self) -> bool:
        """Whether the models are mixtures of experts."""
        return "num_experts" in self.optional

    @property
    def is_gemma(self) -> bool:
        """Whether `config.json` has Gemma's fields."""
        return "attention_scale" in self.optional

    def lacks(self, config: ModelConfig) -> dict[str, str]:
        """Return the fields of `config` that the family does not support, each with a description for the error."""
        config = canonical(config)
        found = {}
        for each in dataclasses.fields(ModelConfig):
            if each.name in _SHARED_FIELDS | self.optional:
                continue
            value, supported = getattr(config, each.name), self.shape.get(each.name, each.default)
            if value != supported:
                found[each.name] = f"{each.name} {value}, where {self.model_type} has {supported}"
        if self.is_mixture and config.num_experts is None:
            found["num_experts"] = f"one feed-forward layer, where {self.model_type} has experts"
        # transformers requires this of these families, though their layers do not.
        if self.model_type in ("llama", "gemma2", "gemma3_text") and config.d_model % config.num_heads:
            allowed = f"where {self.model_type} has a divisor of d_model, {config.d_model}"
            found["num_heads"] = f"num_heads {config.num_heads}, {allowed}"
        scale = config.attention_scale
        if self.is_gemma and scale is not None and round(scale**-2) ** -0.5 != scale:
            found["attention_scale"] = f"attention_scale {scale}, where {self.model_type} has 1 / sqrt(n) of a whole number n"
        scaled_windows = config.window is not None and config.rope_scaling.kind != "default" and config.local_rope_theta is None
        if "local_rope_theta" in self.optional and scaled_windows:
            found["rope_scaling"] = f"rope_scaling in local layers, where {self.model_type} has a local_rope_theta"
        return found


_SILU: dict[str, Any] = {"hidden_act": "silu"}
_NO_BIAS: dict[str, Any] = {"attention_bias": False}
_QWEN_DEFAULTS: dict[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_EXPERTS = frozenset({"num_experts", "experts_per_token"})
_GEMMA: dict[str, Any] = {"norm": "sandwich", "ffn": "geglu_tanh", "unit_offset_norms": True, "scale_embeddings": True}
_GEMMA_OPTIONAL = frozenset({"window", "window_pattern", "attention_scale", "logit_softcap"})
_GEMMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": False,
}  # fmt: skip

# In order of preference when a family is chosen for a model.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", fixed=_SILU | _NO_BIAS | {"mlp_bias": False}),
        Family(
            "mistral",
            "MistralForCausalLM",
            optional=frozenset({"window"}),
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            fixed=_SILU,
            windows="all",
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            shape={"qkv_bias": True},
            optional=frozenset({"window", "window_pattern"}),
            defaults=_QWEN_DEFAULTS,
            fixed=_SILU,
            windows="last",
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            shape={"qk_norm": True},
            optional=frozenset({"window", "window_pattern"}),
            defaults=_QWEN_DEFAULTS | {"head_dim": 128},
            fixed=_SILU | _NO_BIAS,
            windows="last",
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            optional=_EXPERTS | {"window"},
            defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
            | {"rms_norm_eps": 1e-5},
            fixed=_SILU | {"router_jitter_noise": 0.0},
            windows="all",
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            shape={"qk_norm": True},
            optional=_EXPERTS | {"normalise_expert_weights"},
            defaults={"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            # Every layer has experts.
            fixed=_SILU | _NO_BIAS | {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            shape=_GEMMA,
            optional=_GEMMA_OPTIONAL | {"attention_softcap"},
            defaults=_GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            fixed=_GEMMA_FIXED,
            windows="alternating",
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            shape=_GEMMA | {"qk_norm": True},
            optional=_GEMMA_OPTIONAL | {"local_rope_theta"},
            defaults=_GEMMA_DEFAULTS
            | {"vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
            # transformers accepts an attention softcap for Gemma 3 but does not apply it.
            fixed=_GEMMA_FIXED | {"attn_logit_softcapping": None},
            windows="pattern",
        ),
    )
}
"""Supported model families, by the `model_type` of `config.json`."""


def choose_family(config: ModelConfig, preferred: str | None = None) -> Family:
    """Return `preferred` if it supports this shape, else the first family that does; raise `UserError` if none does."""
    if preferred is not None and not FAMILIES[preferred].lacks(config):
        return FAMILIES[preferred]
    lacking = [(family, family.lacks(config)) for family in FAMILIES.values()]
    least = min(len(lacks) for _, lacks in lacking)
    if not least:
        return next(family for family, lacks in lacking if not lacks)
    reasons: dict[str, str] = {}
    for _, lacks in lacking:
        if len(lacks) == least:
            reasons = lacks | reasons
    raise UserError(f"the model has {'; '.join(reasons.values())}: none of the families {', '.join(FAMILIES)} supports this")


def canonical(config: ModelConfig) -> ModelConfig:
    """Return an equivalent shape with one spelling for each field, so that equal models have equal shapes."""
    width = config.head_width
    kinds = "".join("L" if config.is_local(layer) else "G" for layer in range(config.num_layers))
    scale, local_theta = config.attention_scale, config.local_rope_theta
    if local_theta == config.rope_theta and config.rope_scaling.kind == "default":
        local_theta = None
    windowed = "L" in kinds
    return dataclasses.replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=None if width * config.num_heads == config.d_model else width,
        rotary_dim=None if config.rotary_dim == width else config.rotary_dim,
        attention_scale=None if scale is None or math.isclose(scale, width**-0.5, rel_tol=1e-12) else scale,
        window=config.window if windowed else None,
        window_pattern=_shortest_pattern(kinds) if windowed else "L",
        local_rope_theta=local_theta if windowed else None,
    )


def _shortest_pattern(kinds: str) -> str:
    # The shortest prefix that gives `kinds` when it is repeated and cut.
    return next(kinds[:n] for n in range(1, len(kinds) + 1) if (kinds[:n] * len(kinds))[: len(kinds)] == kinds)


# Unsupported features of other families.
_UNSUPPORTED = {
    "gpt2": "learned positions, LayerNorm, biases and GELU",
    "gpt_neox": "LayerNorm, biases, GELU and parallel branches",
    "qwen2_moe": "shared experts",
    "gpt_oss": "experts with biases",
    "deepseek_v3": "shared experts",
    "llama4": "shared experts",
    "llama4_text": "shared experts",
}


def unknown_family(model_type: Any) -> str:
    """Return the error text for an unknown `model_type`."""
    lacking = _UNSUPPORTED.get(model_type) if isinstance(model_type, str) else None
    reason = f", with {lacking}, which are not supported" if lacking else ""
    *others, last = (*FAMILIES, "gemma3")
    return f"model_type {json.dumps(model_type)}{reason}: expected {', '.join(others)} or {last}"
