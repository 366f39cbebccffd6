"""FlashAttention-2 in plain PyTorch: the algorithm of the kernels, readable, a tile at a time.

The reference writes the scores out; this form shows why that is not needed. Dao 2023, "FlashAttention-2", algorithms 1 and 2.
"""

from typing import Any

import torch
from torch import Tensor


def _visible(start: int, end: int, keys: slice, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    # Which of the tile's keys its queries may see, (M, N): the causal mask, queries aligned to the end of the keys.
    positions = torch.arange(start, end, device=device) + num_keys - num_queries
    return torch.arange(keys.start, keys.stop, device=device) <= positions[:, None]


def _key_tiles(end: int, num_queries: int, num_keys: int, causal: bool, block_n: int) -> list[slice]:
    # The tiles of keys that queries up to `end` meet: under a causal mask, none beyond the position of the last.
    last = min(num_keys, end + num_keys - num_queries) if causal else num_keys
    return [slice(n, min(n + block_n, num_keys)) for n in range(0, max(last, 0), block_n)]


class TiledAttention(torch.autograd.Function):
    """q (N, T, K), k and v (N, S, K) -> o (N, T, K); saves q, k, v, o and one lse (N, T), where N counts batch and heads."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, block_m: int, block_n: int
    ) -> tuple[Tensor, Tensor]:
        """Algorithm 1: one pass over the keys a tile of queries, rescaling whenever a greater score turns up."""
        num_queries, num_keys = q.shape[1], k.shape[1]
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for start in range(0, num_queries, block_m):
            end = min(start + block_m, num_queries)
            q_tile = q[:, start:end]
            accumulator = torch.zeros_like(q_tile)
            row_sum = q_tile.new_zeros(q_tile.shape[:2])
            row_max = torch.full_like(row_sum, -torch.inf)
            for keys in _key_tiles(end, num_queries, num_keys, causal, block_n):
                scores = q_tile @ k[:, keys].mT * scale
                if causal:
                    scores = scores.masked_fill(~_visible(start, end, keys, num_queries, num_keys, q.device), -torch.inf)
                new_max = torch.maximum(row_max, scores.amax(dim=-1))
                # A row that has seen no key yet has nothing to subtract: -inf - -inf would be NaN.
                reference = new_max.masked_fill(new_max == -torch.inf, 0.0)
                probabilities = torch.exp(scores - reference[..., None])
                rescale = torch.exp(row_max - reference)
                row_sum = row_sum * rescale + probabilities.sum(dim=-1)
                accumulator = accumulator * rescale[..., None] + probabilities @ v[:, keys]
                row_max = new_max
            o[:, start:end] = accumulator / row_sum.masked_fill(row_sum == 0, 1.0)[..., None]
            lse[:, start:end] = row_max + torch.log(row_sum)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = causal, scale, block_m, block_n
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Algorithm 2: probabilities come back from lse, a tile at a time."""
        q, k, v, o, lse = ctx.saved_tensors
        causal, scale, block_m, block_n = ctx.options
        do = gradients[0]
        num_queries, num_keys = q.shape[1], k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (o * do).sum(dim=-1)
        for start in range(0, num_queries, block_m):
            end = min(start + block_m, num_queries)
            rows = slice(start, end)
            for keys in _key_tiles(end, num_queries, num_keys, causal, block_n):
                probabilities = torch.exp(q[:, rows] @ k[:, keys].mT * scale - lse[:, rows, None])
                if causal:
                    hidden = ~_visible(start, end, keys, num_queries, num_keys, q.device)
                    probabilities = probabilities.masked_fill(hidden, 0.0)
                dv[:, keys] += probabilities.mT @ do[:, rows]
                ds = probabilities * (do[:, rows] @ v[:, keys].mT - delta[:, rows, None])
                dq[:, rows] += ds @ k[:, keys] * scale
                dk[:, keys] += ds.mT @ q[:, rows] * scale
        return dq, dk, dv, None, None, None, None


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    *,
    block_m: int = 64,
    block_n: int = 64,
) -> Tensor:
    """`attention` by FlashAttention-2 in PyTorch, a tile at a time: q (..., T, K); k, v (..., S, K) -> (..., T, K).

    Causal or full; leading dimensions are equal. float16 and bfloat16 are computed as such: for checking, use float32.
    """
    if block_m < 1 or block_n < 1:
        raise ValueError(f"tiles of {block_m} by {block_n}: allowed is 1 or more")
    if k.shape != v.shape or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: allowed are (..., T, K), and (..., S, K) for k and v")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    o, _ = TiledAttention.apply(*rows, causal, scale, block_m, block_n)  # pyright: ignore[reportGeneralTypeIssues]
    return o.view(q.shape)
