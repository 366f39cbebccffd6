"""Shapes of small models for property tests, covering every field of `ModelConfig` that affects the cost of a step."""

from typing import Any, get_args

from hypothesis import strategies as st

from tilewright.model import ModelConfig
from tilewright.model.config import FeedForward, Norm, NormType

GEMMA: dict[str, Any] = {
    "head_dim": 12, "norm": "sandwich", "unit_offset_norms": True, "scale_embeddings": True, "tie_embeddings": True,
    "ffn": "geglu_tanh", "window": 5, "window_pattern": "LG", "local_rope_theta": 100.0, "attention_scale": 0.3,
    "attention_softcap": 2.0, "logit_softcap": 3.0,
}  # fmt: skip
"""Options of Gemma 2 and 3, with a window and a head dim that no other small shape uses."""
QWEN: dict[str, Any] = {"qkv_bias": True, "rotary_dim": 4, "tie_embeddings": True}
"""Options of Qwen 2, and partial RoPE."""


@st.composite
def any_shape(draw: st.DrawFn) -> ModelConfig:
    kv_heads, groups, half_dim = (draw(st.integers(1, 3)) for _ in range(3))
    heads, head_dim = kv_heads * groups, 2 * half_dim
    # None: derive the head dim from d_model.
    d_model = draw(st.none() | st.integers(1, 20))
    some: dict[str, Any] = {"head_dim": None if d_model is None else head_dim}
    num_layers, norm_type = draw(st.integers(1, 3)), draw(st.sampled_from(get_args(NormType)))
    if draw(st.booleans()):
        some["window"] = draw(st.integers(1, 14))
        some["window_pattern"] = draw(st.text("LG", min_size=1, max_size=num_layers))
        some["local_rope_theta"] = draw(st.sampled_from([None, 100.0]))
    for name in ("tie_embeddings", "qk_norm", "rope", "qkv_bias", "scale_embeddings"):
        some[name] = draw(st.booleans())
    for name in ("attention_scale", "attention_softcap", "logit_softcap"):
        some[name] = draw(st.sampled_from([None, 2.0]))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 40)),
        context_length=draw(st.integers(2, 12)),
        d_model=heads * head_dim if d_model is None else d_model,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_ff=draw(st.integers(1, 30)),
        norm=draw(st.sampled_from(get_args(Norm))),
        norm_type=norm_type,
        ffn=draw(st.sampled_from(get_args(FeedForward))),
        rotary_dim=draw(st.none() | st.integers(1, half_dim).map(lambda pairs: 2 * pairs)),
        unit_offset_norms=norm_type == "rms_norm" and draw(st.booleans()),
        **some,
    )
