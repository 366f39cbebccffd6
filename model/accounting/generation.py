"""Cost of generation: each decoding step reads every weight and the whole KV cache."""

from dataclasses import dataclass

from ...datasheet import GPU
from ...errors import UserError
from ..config import ModelConfig
from ..policy import ITEMSIZE, Dtype, Policy
from .block import reach
from .operations import operations
from .roofline import PEAK_OF


@dataclass(frozen=True)
class Generation:
    """Cost of one decoding step of a batch: one token per sequence."""

    flops_per_token: int
    kv_cache_bytes: int
    """Keys and values of all tokens, layers and sequences; local layers also keep keys beyond their window."""
    bytes_per_step: int
    """Least traffic: the weights and the attended part of the cache once, and the activations of the new tokens."""
    tokens_per_second: float | None
    """Upper bound from bandwidth and FLOPs, over all sequences; None without a GPU."""
    bound_by: str | None
    """Either memory or compute."""


def kv_cache_bytes(config: ModelConfig, tokens: int, batch_size: int = 1, dtype: Dtype = "bfloat16") -> int:
    """Return the bytes of the keys and values of `tokens` tokens per sequence: 2 L Hkv K elements per token (Shazeer 2019)."""
    return 2 * config.num_layers * config.kv_heads * config.head_width * ITEMSIZE[dtype] * tokens * batch_size


def generation(
    config: ModelConfig,
    tokens: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bfloat16",
    gpu: GPU | None = None,
    window: int | None = None,
) -> Generation:
    """Return the cost of the step that generates token number `tokens`, by default the last of the context.

    The step attends to `tokens` tokens, or to those within a layer's window; `window` overrides the windows of the layers.
    """
    seen = config.context_length if tokens is None else tokens
    if seen < 1:
        raise UserError(f"tokens is {seen}: expected at least 1")
    # A step is a forward pass of one token per sequence, except that attention reads the cache.
    ops = operations(config, batch_size, 1, Policy(loss="whole", compute=dtype, weights=dtype))
    one = [op for op in ops if op.group not in ("attention", "loss")]
    attended = sum(reach(config, layer, seen, window) for layer in range(config.num_layers))
    attention = 4 * attended * config.q_width
    per_token = kv_cache_bytes(config, 1, batch_size, dtype)
    # Queries in and outputs out; the new keys and values are written to the cache.
    around = 2 * config.num_layers * batch_size * config.q_width * ITEMSIZE[dtype] + per_token
    flops = sum(op.forward_flops for op in one) // batch_size + attention
    moved = sum(op.forward_bytes for op in one) + per_token * attended // config.num_layers + around
    held = per_token * seen
    peak = gpu and gpu.peak_flops(PEAK_OF[dtype])
    if gpu is None or peak is None:
        return Generation(flops, held, moved, None, None)
    memory_s, compute_s = moved / (gpu.bandwidth * 1e12), batch_size * flops / peak
    bound_by = "memory" if memory_s > compute_s else "compute"
    return Generation(flops, held, moved, batch_size / max(memory_s, compute_s), bound_by)
