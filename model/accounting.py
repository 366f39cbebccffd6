"""Parameters and FLOPs of a Transformer, from its shape alone. A matrix product (m, k) x (k, n) costs 2 m k n FLOPs."""

from .config import ModelConfig


def parameters_by_group(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each group of weights."""
    d, layers = config.d_model, config.num_layers
    kv_width = config.head_dim * config.kv_heads
    return {
        "embedding": config.vocab_size * d,
        "attention": layers * (2 * d * d + 2 * d * kv_width),
        "feed-forward": layers * 3 * d * config.d_ff,
        "norms": layers * 2 * d + d,
        "head": 0 if config.tie_embeddings else config.vocab_size * d,
    }


def num_parameters(config: ModelConfig) -> int:
    """Return the number of trained parameters."""
    return sum(parameters_by_group(config).values())


def forward_flops_by_group(config: ModelConfig, context_length: int | None = None) -> dict[str, int]:
    """Return the FLOPs of one sequence's forward pass by group, attention counted in full (as if not causal).

    Only matrix products count, as in `torch.utils.flop_counter`.
    """
    tokens = config.context_length if context_length is None else context_length
    d, layers = config.d_model, config.num_layers
    kv_width = config.head_dim * config.kv_heads
    return {
        "projections": layers * 2 * tokens * (2 * d * d + 2 * d * kv_width),
        "attention": layers * 4 * tokens * tokens * d,
        "feed-forward": layers * 6 * tokens * d * config.d_ff,
        "head": 2 * tokens * d * config.vocab_size,
    }


def forward_flops(config: ModelConfig, context_length: int | None = None) -> int:
    """Return the FLOPs of one sequence's forward pass."""
    return sum(forward_flops_by_group(config, context_length).values())


def training_flops_per_token(config: ModelConfig, context_length: int | None = None) -> float:
    """Return the FLOPs that training spends on a token: forward, and twice that backward, nothing recomputed."""
    tokens = config.context_length if context_length is None else context_length
    return 3 * forward_flops(config, tokens) / tokens


def model_flops_utilisation(config: ModelConfig, tokens_per_second: float, peak_flops: float | None) -> float | None:
    """Return the MFU (PaLM, appendix B), a share of `peak_flops` (FLOP/s); None where no peak is known."""
    if peak_flops is None:
        return None
    return training_flops_per_token(config) * tokens_per_second / peak_flops
