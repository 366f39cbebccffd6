"""PyTorch's own fused attention, for where the kernels do not run, with what causality excludes kept from every result.

PyTorch multiplies the values that a mask excludes by 0, and 0 times a value that is not finite is NaN. So it is given finite
tensors, and what was not finite comes back afterwards, where it may be seen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _split_finite(x: Tensor) -> tuple[Tensor, Tensor]:
    # x (B, H, T, K) with 0 in the place of what is not finite, and which tokens (B, H, T) had such channels.
    return x.nan_to_num(0.0, 0.0, 0.0), ~x.isfinite().all(dim=-1)


def _nan_where(bad: Tensor, dtype: torch.dtype) -> Tensor:
    # 0 or NaN, (B, H, T, 1): to be added.
    return torch.zeros_like(bad, dtype=dtype).masked_fill(bad, torch.nan)[..., None]


class _Enter(torch.autograd.Function):
    # q, k, v -> the same, finite, and which queries (B, H, T) see what was not, as 0 or 1. The gradient of that result says
    # which queries have a gradient that is not finite: NaN then reaches the keys that they see.
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (q, bad_q), (k, bad_k), (v, bad_v) = map(_split_finite, (q, k, v))
        earlier = (bad_k | bad_v).to(q.dtype).cummax(dim=-1).values
        seen = earlier.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return q, k, v, torch.maximum(seen, bad_q.to(q.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kv_heads = inputs[1].shape[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, bad = gradients
        later = bad.flip(-1).cummax(dim=-1).values.flip(-1).unflatten(1, (ctx.kv_heads, -1)).amax(dim=2)
        of_keys = _nan_where(later > 0, dk.dtype)
        return dq + _nan_where(bad > 0, dq.dtype), dk + of_keys, dv + of_keys


class _Leave(torch.autograd.Function):
    # o and the queries that see what is not finite -> o, NaN in those.
    generate_vmap_rule = True

    @staticmethod
    def forward(o: Tensor, seen: Tensor) -> Tensor:
        return o + _nan_where(seen > 0, o.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        do, bad = _split_finite(gradients[0])
        (seen,) = ctx.saved_tensors
        return do, torch.maximum(seen, bad.to(seen.dtype))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """`attention` of q (B, H, T, K), k and v (B, Hkv, T, K): any number of keys where not causal."""
    seen = None
    if causal:
        q, k, v, seen = _Enter.apply(q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o if seen is None else _Leave.apply(o, seen)  # pyright: ignore[reportReturnType]
