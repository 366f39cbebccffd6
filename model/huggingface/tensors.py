"""Views of our tensors under Hugging Face names: ours fuse projections and interleave RoPE pairs."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..config import ModelConfig


class TensorView(NamedTuple):
    """A Hugging Face tensor as a view of one of ours, without a copy."""

    view: Tensor
    """A view of our tensor that becomes theirs when reshaped to `shape`."""
    shape: tuple[int, ...]
    """Shape of the Hugging Face tensor."""

    def theirs(self) -> Tensor:
        """Return the tensor in the Hugging Face shape; copies if the element order differs."""
        return self.view.reshape(self.shape)


def tensor_views(config: ModelConfig, ours: Callable[[str], Tensor], vocab_size: int) -> dict[str, TensorView]:
    """Return every tensor of the format by its Hugging Face name.

    `ours` maps a parameter name of `TransformerLM` to the parameter, or to a tensor of its shape, such as its gradient. The
    embedding and the head are cut to the first `vocab_size` rows.
    """
    half = config.head_width // 2

    def whole(tensor: Tensor) -> TensorView:
        return TensorView(tensor, tuple(tensor.shape))

    def halves(rows: Tensor) -> TensorView:
        # Row 2i of our head is row i of theirs, and row 2i + 1 is row i + K / 2: their RoPE pairs the two halves of a head.
        return TensorView(rows.unflatten(0, (-1, half, 2)).transpose(1, 2), tuple(rows.shape))

    def attention(prefix: str, name: str) -> dict[str, TensorView]:
        # (H + 2 Hkv) K rows.
        q, k, v = ours(f"{prefix}.qkv_proj.{name}").split([config.q_width, config.kv_width, config.kv_width])
        return {f"q_proj.{name}": halves(q), f"k_proj.{name}": halves(k), f"v_proj.{name}": whole(v)}

    views = {"model.embed_tokens.weight": whole(ours("token_embeddings.weight")[:vocab_size])}
    for i in range(config.num_layers):
        layer, attn, theirs = f"layers.{i}", f"layers.{i}.attn", f"model.layers.{i}"
        parts = attention(attn, "weight") | (attention(attn, "bias") if config.qkv_bias else {})
        parts["o_proj.weight"] = whole(ours(f"{attn}.output_proj.weight"))
        if config.qk_norm:
            parts |= {f"{name}.weight": halves(ours(f"{attn}.{name}.weight")) for name in ("q_norm", "k_norm")}
        views |= {f"{theirs}.self_attn.{name}": view for name, view in parts.items()}
        feed = _feed_forward(config, lambda name, layer=layer: ours(f"{layer}.ffn.{name}.weight"))
        views |= {f"{theirs}.{name}.weight": whole(weight) for name, weight in feed.items()}
        views |= {f"{theirs}.{name}.weight": whole(ours(f"{layer}.{norm}.weight")) for name, norm in _norms(config).items()}
    views["model.norm.weight"] = whole(ours("ln_final.weight"))
    if not config.tie_embeddings:
        views["lm_head.weight"] = whole(ours("lm_head.weight")[:vocab_size])
    return views


def _feed_forward(config: ModelConfig, ours: Callable[[str], Tensor]) -> dict[str, Tensor]:
    # gate_up_proj ((X), 2F, D), down_proj ((X), D, F).
    (gate, up), down = ours("gate_up_proj").chunk(2, dim=-2), ours("down_proj")
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    if config.num_experts is None:
        return {f"mlp.{name}": weight for name, weight in parts.items()}
    # Mixtral has other names; unlike Qwen 3 it has no norms of queries and keys.
    block = "mlp" if config.qk_norm else "block_sparse_moe"
    if not config.qk_norm:
        parts = {"w1": gate, "w3": up, "w2": down}
    experts = {f"{block}.experts.{i}.{name}": w[i] for i in range(config.num_experts) for name, w in parts.items()}
    return {f"{block}.gate": ours("router"), **experts}


def _norms(config: ModelConfig) -> dict[str, str]:
    if config.norm == "pre":
        return {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    return {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln1_post",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ln2_post",
    }
