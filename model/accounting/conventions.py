"""MFU of one run under the conventions of other projects: their FLOPs per token over their peak."""

from dataclasses import dataclass, replace

from ..config import ModelConfig
from ..policy import Policy
from .block import reach
from .flops import hardware_flops, model_flops, num_active_parameters, parameters_by_group
from .operations import operations


@dataclass(frozen=True)
class Convention:
    """One convention for counting training FLOPs."""

    name: str
    flops_per_token: float
    """Forward and backward FLOPs."""
    mfu: float | None
    """Share of the peak that this convention uses; None without a speed or a peak."""
    note: str


A100_BF16 = 312e12


def conventions(
    config: ModelConfig,
    context_length: int | None = None,
    tokens_per_second: float | None = None,
    peak_flops: float | None = None,
    policy: Policy | None = None,
) -> list[Convention]:
    """Return FLOPs and MFU by our and others' conventions, at `tokens_per_second` on a GPU of `peak_flops` (FLOP/s).

    L layers, H heads of Q channels, context T, N active parameters per token; N and T follow the code of each project.
    """
    policy = policy or Policy()
    context = config.context_length if context_length is None else context_length
    n, layers, width = num_active_parameters(config), config.num_layers, config.q_width  # H Q
    embedding = parameters_by_group(config)["embedding"]
    seen = sum(reach(config, layer, context, policy.window) for layer in range(layers))
    full = operations(config, 1, context, policy)
    causal = operations(config, 1, context, policy, exact_causal=True)
    attention = 3 * sum(op.forward_flops for op in full if op.group == "attention")
    products = model_flops(full) - attention
    square = operations(config, 1, context, replace(policy, window=context))
    counter = model_flops(square) + sum(op.recomputed_flops for op in square if op.group == "attention")
    counter += 3 * sum(op.padding_flops for op in square)
    ours = peak_flops
    rows: list[tuple[str, float, float | None, str]] = [
        ("tilewright", model_flops(full) / context, ours, "matrix products, full attention, backward 2x forward"),
        ("exact causal", model_flops(causal) / context, ours, "the same with T (T + 1) / 2 pairs of query and key"),
        ("HFU", hardware_flops(full) / context, ours, "the first, with recomputation under the policy"),
        ("PaLM", 6 * n + 12 * layers * width * context, ours, "6N + 12LHQT, appendix B; an untied embedding is in N"),
        ("nanoGPT", 6 * n + 12 * layers * width * context, A100_BF16, "PaLM's, always over an A100's 312 TFLOP/s"),
        ("nanochat", 6 * (n - embedding) + 12 * width * seen, ours, "PaLM's without the embedding, windows counted"),
        ("llm.c", 6 * n + 6 * layers * width * context, ours, "6N + 6LCT: causal attention as half"),
        ("Megatron / MaxText", (products + attention / 2) / context, ours, "exact products, causal attention as half"),
        ("6N", 6 * n, ours, "Kaplan et al. 2020: no attention"),
        ("FlopCounterMode", counter / context, ours, "PyTorch's counter: flash attention's backward as 2.5x forward"),
    ]
    return [
        Convention(name, flops, flops * tokens_per_second / peak if tokens_per_second and peak else None, note)
        for name, flops, peak, note in rows
    ]
