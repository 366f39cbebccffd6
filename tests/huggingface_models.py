"""Tiny random models of Hugging Face's families, built by transformers. Norms and biases are random, so that errors show."""

from typing import Any

import torch

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e3}
GEMMA: dict[str, Any] = {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20}

# Windows are shorter than the texts. Some head dims differ from hidden_size / num_attention_heads.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama 3.2, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 12}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": 5}),
    "mistral, global": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, yarn": ("qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "mixtral": ("mixtral", {"num_local_experts": 3, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 12}),
    "qwen3_moe, normalised": (
        "qwen3_moe",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 3, "sliding_window_pattern": 2}
        | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
    ),
}


def make(case: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Return a transformers model in evaluation mode."""
    import transformers

    family, of_case = CASES[case]
    # A padding token's row would have no gradient.
    common = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.3, "pad_token_id": None,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **common | of_case | fields)
    torch.manual_seed(2)
    # Only eager attention supports softcaps.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Randomize every vector: ones and zeros would hide a misplaced norm or bias."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(-0.5, 1.5)


def reload(folder: Any) -> Any:
    """Return the model that transformers loads from a folder."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def as_stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under their names in checkpoint files, with one tensor per matrix and expert."""
    stored = {}
    for name, tensor in tensors.items():
        block, experts, last = name.rpartition(".experts.")
        if not experts:
            stored[name] = tensor
            continue
        parts = (
            dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True))
            if last == "gate_up_proj"
            else {last: tensor}
        )
        stored |= {f"{block}.experts.{i}.{part}.weight": w[i] for part, w in parts.items() for i in range(len(tensor))}
    return stored


def of_mixtral(name: str) -> str:
    """Return the name of a tensor in Mixtral's checkpoint files."""
    for ours, theirs in {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        name = name.replace(ours, theirs)
    return name
