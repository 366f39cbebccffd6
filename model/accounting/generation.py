"""The cost of generating text: a token at a time, every weight and the whole KV cache read for each."""

from dataclasses import dataclass

from ...errors import UserError
from ...kernels.datasheet import GPU
from ..config import ModelConfig
from .block import reach
from .operations import operations
from .policy import ITEMSIZE, Dtype, Policy
from .roofline import PEAK_OF


@dataclass(frozen=True)
class Generation:
    """One decoding step of a batch: a token for each sequence."""

    flops_per_token: int
    kv_cache_bytes: int
    """Keys and values of all tokens and layers, of the whole batch: local layers hold those beyond their window too."""
    bytes_per_step: int
    """Least bytes: weights and the attended part of the cache once, activations of the new tokens."""
    tokens_per_second: float | None
    """The most that bandwidth and FLOPs allow, all sequences together; None without a GPU."""
    bound_by: str | None
    """memory or compute."""


def kv_cache_bytes(config: ModelConfig, tokens: int, batch_size: int = 1, dtype: Dtype = "bfloat16") -> int:
    """Return the bytes of the keys and values of `tokens` tokens of each sequence: 2 L Hkv K a token (Shazeer 2019)."""
    return 2 * config.num_layers * config.kv_heads * config.head_width * ITEMSIZE[dtype] * tokens * batch_size


def generation(
    config: ModelConfig,
    tokens: int | None = None,
    batch_size: int = 1,
    dtype: Dtype = "bfloat16",
    gpu: GPU | None = None,
    window: int | None = None,
) -> Generation:
    """Return the cost of the step that makes token number `tokens`, by default the context's last.

    It attends to as many tokens, or those in the window of a layer; a `window` stands in place of the layers' own.
    """
    seen = config.context_length if tokens is None else tokens
    if seen < 1:
        raise UserError(f"tokens is {seen}: it must be at least 1")
    # A step is the forward pass of one token a sequence, but for attention, which looks back over the cache.
    ops = operations(config, batch_size, 1, Policy(loss="whole", compute=dtype, weights=dtype))
    one = [op for op in ops if op.group not in ("attention", "loss")]
    attended = sum(reach(config, layer, seen, window) for layer in range(config.num_layers))
    attention = 4 * attended * config.q_width
    per_token = kv_cache_bytes(config, 1, batch_size, dtype)
    # Queries in and outputs out; the new keys and values go into the cache.
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
