"""The cost of generating text: a token at a time, every weight and the whole KV cache read for each."""

from dataclasses import dataclass

from ...errors import UserError
from ...kernels.datasheet import GPU
from ..config import ModelConfig
from .operations import operations
from .policy import ITEMSIZE, Dtype, Policy
from .roofline import PEAK_OF


@dataclass(frozen=True)
class Generation:
    """One decoding step of a batch: a token for each sequence."""

    flops_per_token: int
    kv_cache_bytes: int
    """Keys and values of all layers, of the whole batch."""
    bytes_per_step: int
    """Least bytes: weights and cache once, activations of the new tokens."""
    tokens_per_second: float | None
    """The most that bandwidth and FLOPs allow, all sequences together; None without a GPU."""
    bound_by: str | None
    """memory or compute."""


def kv_cache_bytes(config: ModelConfig, tokens: int, batch_size: int = 1, dtype: Dtype = "bfloat16") -> int:
    """Return the bytes of the keys and values of `tokens` tokens of each sequence: 2 L Hkv K a token (Shazeer 2019)."""
    return 2 * config.num_layers * config.kv_heads * config.head_dim * ITEMSIZE[dtype] * tokens * batch_size


def generation(
    config: ModelConfig,
    tokens: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bfloat16",
    gpu: GPU | None = None,
    window: int | None = None,
) -> Generation:
    """Return the cost of the step that makes token number `tokens`, which attends to as many; by default the context's last."""
    seen = config.context_length if tokens is None else tokens
    if seen < 1:
        raise UserError(f"tokens is {seen}: it must be at least 1")
    seen = seen if window is None else min(seen, window)
    # A step is the forward pass of one token a sequence, but for attention, which looks back over the cache.
    ops = operations(config, batch_size, 1, Policy(loss="whole", compute=dtype, weights=dtype))
    one = [op for op in ops if op.group not in ("attention", "loss")]
    attention = config.num_layers * 4 * seen * config.d_model
    cache = kv_cache_bytes(config, seen, batch_size, dtype)
    # Queries in and outputs out; the new keys and values go into the cache.
    around = 2 * config.num_layers * batch_size * config.d_model * ITEMSIZE[dtype] + kv_cache_bytes(
        config, 1, batch_size, dtype
    )
    flops = sum(op.forward_flops for op in one) // batch_size + attention
    moved = sum(op.forward_bytes for op in one) + cache + around
    peak = gpu and gpu.peak_flops(PEAK_OF[dtype])
    if gpu is None or peak is None:
        return Generation(flops, cache, moved, None, None)
    memory_s, compute_s = moved / (gpu.bandwidth * 1e12), batch_size * flops / peak
    bound_by = "memory" if memory_s > compute_s else "compute"
    return Generation(flops, cache, moved, batch_size / max(memory_s, compute_s), bound_by)
