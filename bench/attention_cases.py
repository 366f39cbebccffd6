"""The shapes at which attention is measured, their inputs, and their exact results: the reference, a few queries at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import costs, reference
from ..kernels.costs import Cost

# Scores that the reference holds at once, of all heads of one sequence.
SCORES = 2**26
# Of a token of one head. Rounding probabilities and their gradients to bfloat16, as every fused form does, costs up to 1.5%; a
# wrong mask or a lost tile costs a token or more. PyTorch's reference, which rounds only results, says too little: 0.2%.
TOLERANCE = 2**-5


@dataclass(frozen=True)
class AttentionCase:
    """One shape in bfloat16; causal, queries being the last of the keys. B batch, H heads, T queries, S keys, K head dim."""

    batch: int
    num_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    window: int | None = None
    document_lengths: tuple[int, ...] | None = None
    """Of the documents that every sequence packs."""

    @property
    def name(self) -> str:
        """B1 H16 T16384 K128 and what is special."""
        heads = f"H{self.num_heads}" + (f"/{self.num_kv_heads}" if self.num_kv_heads != self.num_heads else "")
        tokens = f"T{self.num_queries}" + (f" S{self.num_keys}" if self.num_keys != self.num_queries else "")
        window = f" window {self.window}" if self.window else ""
        documents = f" {len(self.document_lengths)} documents" if self.document_lengths else ""
        return f"attention B{self.batch} {heads} {tokens} K{self.head_dim}{window}{documents}"

    @property
    def is_plain(self) -> bool:
        """Causal self-attention of as many queries as keys and values, without more to it."""
        special = self.window is not None or self.document_lengths is not None
        return not special and self.num_queries == self.num_keys and self.num_heads == self.num_kv_heads

    @property
    def costs(self) -> dict[str, Cost]:
        """What each direction costs; a decoding step has no backward pass."""
        pairs = costs.attention_pairs(self.num_queries, self.num_keys, True, self.window, self.document_lengths)
        shape = (self.batch, self.num_heads, self.num_kv_heads, self.num_queries, self.num_keys, self.head_dim)
        forward, backward = costs.attention(*shape, pairs, 2)
        if self.num_queries < self.num_keys:
            return {"forward": forward}
        return {"forward": forward, "backward": backward, "both": forward + backward}

    @property
    def score_bytes(self) -> int:
        """Size of all scores in float32, which nobody should hold."""
        return 4 * self.batch * self.num_heads * self.num_queries * self.num_keys

    def make(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q (B, H, T, K), k, v (B, Hkv, S, K) and do, like q; in memory (B, T, H, K), as projections leave them."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(heads: int, tokens: int) -> Tensor:
            shape = (self.batch, tokens, heads, self.head_dim)
            return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator).transpose(1, 2)

        q, k, v = (draw(*size) for size in ((self.num_heads, self.num_queries), *[(self.num_kv_heads, self.num_keys)] * 2))
        return q, k, v, draw(self.num_heads, self.num_queries)

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        """Return the cumulative lengths of the documents (documents + 1), int32."""
        if self.document_lengths is None:
            return None
        return torch.tensor([0, *np.cumsum(self.document_lengths)], dtype=torch.int32, device=device)

    def document_ids(self, device: torch.device) -> Tensor | None:
        """Return the number of each token's document (S), int64."""
        if self.document_lengths is None:
            return None
        return torch.from_numpy(np.repeat(np.arange(len(self.document_lengths)), self.document_lengths)).to(device)

    def mask(self, device: torch.device) -> Tensor:
        """Return which keys each query sees, boolean (T, S)."""
        ids = self.document_ids(device)
        documents = None if ids is None else ids[None]
        mask = reference.attention_mask(self.num_queries, self.num_keys, True, self.window, documents, device)
        return mask.view(self.num_queries, self.num_keys)


def draw_lengths(num_tokens: int, median: float = 700.0, sigma: float = 1.2, seed: int = 0) -> tuple[int, ...]:
    """Return lengths that sum up to `num_tokens`, drawn from a lognormal distribution, as those of web pages are."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(max(1, int(generator.lognormal(np.log(median), sigma))))
    lengths[-1] -= sum(lengths) - num_tokens
    return tuple(lengths)


def exact(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    """Return o and, where a backward pass is measured, dq, dk and dv by the reference in float32, in memory linear in T."""
    trained = "backward" in case.costs
    results = {"o": q} | ({"dq": q, "dk": k, "dv": v} if trained else {})
    results = {name: torch.zeros(like.shape, device=q.device) for name, like in results.items()}
    rows = max(1, SCORES // (case.num_heads * case.num_keys))
    cu_seqlens = case.cu_seqlens(q.device)
    for sequence in range(case.batch):
        for start in range(0, case.num_queries, rows):
            # The keys that causality leaves a few queries: to the reference, its queries are the last of them.
            end = min(start + rows, case.num_queries)
            own = slice(sequence, sequence + 1), slice(None), slice(start, end)
            seen = *own[:2], slice(0, case.num_keys - case.num_queries + end)
            inputs = [t[place].detach().float().requires_grad_(trained) for t, place in ((q, own), (k, seen), (v, seen))]
            o = reference.attention(*inputs, causal=True, window=case.window, cu_seqlens=cu_seqlens)
            results["o"][own] = o.detach()
            if trained:
                gradients = torch.autograd.grad(o, inputs, do[own].float())
                for name, place, gradient in zip(("dq", "dk", "dv"), (own, seen, seen), gradients, strict=True):
                    results[name][place] += gradient
    return results


def error_of(own: Tensor, right: Tensor) -> float:
    """Return the error of the worst token of any head of `own` (B, H, T, K), as a share of its size, or of the usual size.

    The share keeps late tokens, which average over many keys and are small, from hiding behind the first.
    """
    errors, sizes = ((t.square().sum(dim=-1)) for t in (own.float() - right, right))
    return (errors / sizes.maximum(sizes.mean())).max().sqrt().item()


def attention_cases() -> Iterator[AttentionCase]:
    """Yield what is measured, the most telling first: B T is 16,384 and H K is 2,048, but for the longest and for decoding.

    The first is the shape that CS336's leaderboard ranks.
    """

    def causal(head_dim: int, tokens: int, groups: int = 1, **rest: Any) -> AttentionCase:
        heads = 2048 // head_dim
        return AttentionCase(max(1, 16_384 // tokens), heads, heads // groups, tokens, tokens, head_dim, **rest)

    yield AttentionCase(1, 16, 16, 16_384, 16_384, 64)
    yield from (causal(128, tokens) for tokens in (16_384, 8192, 4096, 2048, 1024, 512))
    yield causal(128, 16_384, window=1024)
    yield causal(128, 16_384, document_lengths=draw_lengths(16_384))
    yield causal(128, 16_384, groups=8)
    for batch in (1, 32):
        yield from (AttentionCase(batch, 32, 4, 1, keys, 128) for keys in (1024, 8192, 65_536))
    yield from (causal(head_dim, tokens) for tokens in (16_384, 4096, 512) for head_dim in (64, 256))
    yield causal(128, 32_768)
    yield causal(128, 65_536, window=1024)
    yield causal(128, 65_536)
