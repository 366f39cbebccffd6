"""FlashAttention-2 in plain PyTorch, one tile at a time: a readable form of the kernels' algorithm.

`reference.attention` materializes the scores; this form does not. Dao 2023, "FlashAttention-2", algorithms 1 and 2.
"""

from typing import Any

import torch
from torch import Tensor


def _visible(start: int, end: int, keys: slice, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    # The causal mask of a tile, (M, N), true where a query sees a key; queries are aligned to the end of the keys.
    positions = torch.arange(start, end, device=device) + num_keys - num_queries
    return torch.arange(keys.start, keys.stop, device=device) <= positions[:, None]


def _key_tiles(end: int, num_queries: int, num_keys: int, causal: bool, block_n: int) -> list[slice]:
    # The key tiles that queries before `end` see; with a causal mask, none beyond the position of the last query.
    last = min(num_keys, end + num_keys - num_queries) if causal else num_keys
    return [slice(n, min(n + block_n, num_keys)) for n in range(0, max(last, 0), block_n)]


class TiledAttention(torch.autograd.Function):
    """q (N, T, K), k and v (N, S, K) -> o (N, T, K), with N = batch * heads. Saves q, k, v, o and lse (N, T)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        scale: float | None = None,
        block_m: int = 64,
        block_n: int = 64,
    ) -> Tensor:
        """Algorithm 1: one pass over the keys per query tile; rescale whenever the row maximum grows."""
        num_queries, num_keys = q.shape[1], k.shape[1]
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for start in range(0, num_queries, block_m):
            end = min(start + block_m, num_queries)
            q_tile = q[:, start:end]
            accumulator = torch.zeros_like(q_tile)
            row_sum = q_tile.new_zeros(q_tile.shape[:2])
            row_max = torch.full_like(row_sum, -torch.inf)
            for keys in _key_tiles(end, num_queries, num_keys, causal, block_n):
                scores = q_tile @ k[:, keys].mT * factor
                if causal:
                    scores = scores.masked_fill(~_visible(start, end, keys, num_queries, num_keys, q.device), -torch.inf)
                new_max = torch.maximum(row_max, scores.amax(dim=-1))
                # A row without visible keys so far has maximum -inf, and -inf - -inf would be NaN.
                reference = new_max.masked_fill(new_max == -torch.inf, 0.0)
                probabilities = torch.exp(scores - reference[..., None])
                rescale = torch.exp(row_max - reference)
                row_sum = row_sum * rescale + probabilities.sum(dim=-1)
                accumulator = accumulator * rescale[..., None] + probabilities @ v[:, keys]
                row_max = new_max
            o[:, start:end] = accumulator / row_sum.masked_fill(row_sum == 0, 1.0)[..., None]
            lse[:, start:end] = row_max + torch.log(row_sum)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = causal, factor, block_m, block_n
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Algorithm 2: recompute the probabilities of each tile from lse."""
        q, k, v, o, lse = ctx.saved_tensors
        causal, scale, block_m, block_n = ctx.options
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
    """Compute `attention` by FlashAttention-2 in PyTorch, one tile at a time: q (..., T, K); k, v (..., S, K) -> (..., T, K).

    Supports causal and full attention; leading dimensions must be equal. float16 and bfloat16 are not widened: use float32 to
    check results.
    """
    if block_m < 1 or block_n < 1:
        raise ValueError(f"block_m is {block_m}, block_n {block_n}: expected 1 or more")
    if k.shape != v.shape or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: expected (..., T, K), and (..., S, K) for k and v")
    rows = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    o = TiledAttention.apply(*rows, causal, scale, block_m, block_n)  # pyright: ignore[reportGeneralTypeIssues]
    return o.view(q.shape)
