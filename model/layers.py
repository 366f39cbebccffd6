"""The layers of the Transformer: thin modules around the kernels, with CS336's initialisation."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Documents, add_rms_norm, attention, rms_norm, rope_qk, rope_qkv, swiglu


def _draw(weight: Tensor, in_features: int, out_features: int) -> None:
    std = math.sqrt(2 / (in_features + out_features))
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Linear):
    """y = x W^T without bias, in the dtype of x; W from a normal of variance 2 / (d_in + d_out), cut at 3 sigma.

    The variance is that of Glorot & Bengio 2010.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        _draw(self.weight, self.in_features, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., d_in) -> (..., d_out)."""
        return F.linear(input, self.weight.to(input.dtype))


class JoinedLinear(Linear):
    """Several `Linear` layers of one input as one product; each part of the weight is drawn as its own layer's would be."""

    def __init__(self, in_features: int, parts: Sequence[int]) -> None:
        self.parts = tuple(parts)
        super().__init__(in_features, sum(parts))

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        for part in self.weight.split(self.parts):
            _draw(part, self.in_features, part.shape[0])


class Head(Linear):
    """A `Linear` layer to one logit a token of the vocabulary; rows of zeros pad its weight to `num_rows`."""

    def __init__(self, d_model: int, vocab_size: int, num_rows: int) -> None:
        self.vocab_size = vocab_size
        super().__init__(d_model, num_rows)

    def reset_parameters(self) -> None:
        """Draw the rows of the vocabulary anew."""
        _draw(self.weight[: self.vocab_size], self.in_features, self.vocab_size)
        nn.init.zeros_(self.weight[self.vocab_size :])


class Embedding(nn.Embedding):
    """A row per token of the vocabulary from a unit normal cut at 3; rows of zeros pad the table to `num_rows`."""

    def __init__(self, vocab_size: int, d_model: int, num_rows: int) -> None:
        self.vocab_size = vocab_size
        super().__init__(num_rows, d_model)

    def reset_parameters(self) -> None:
        """Draw the rows of the vocabulary anew."""
        nn.init.trunc_normal_(self.weight[: self.vocab_size], a=-3, b=3)
        nn.init.zeros_(self.weight[self.vocab_size :])


class RMSNorm(nn.Module):
    """`rms_norm` with a trained weight: (..., D) -> (..., D)."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream; return the normalised sum and the sum, from one kernel."""
        return add_rms_norm(branch, residual, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The gated feed-forward layer W2(silu(W1 x) * W3 x) (Shazeer 2020, eq. 6): (..., D) -> (..., D).

    `gate_up_proj` holds W1 before W3, `down_proj` W2.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up_proj = JoinedLinear(d_model, (d_ff, d_ff))
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class SiLU(nn.Module):
    """The feed-forward layer without a gate, W2 silu(W1 x): (..., D) -> (..., D). `up_proj` holds W1, `down_proj` W2."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position."""
        return self.down_proj(F.silu(self.up_proj(x)))


class LayerCache:
    """Keys and values of the tokens that one layer has seen, in buffers of fixed `shape` (B, Hkv, tokens, K)."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, Hkv, T, K) of new tokens; return those of all tokens so far."""
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with grouped key-value heads: (B, T, D) -> (B, T, D).

    With `qk_norm` each head of the queries and of the keys is normalised before it is rotated (Dehghani et al. 2023,
    section 2), which bounds the scores. Without `rope` nothing is rotated.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        rope: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = d_model // num_heads
        self.rope = rope
        kv_width = self.head_dim * self.num_kv_heads
        self.qkv_proj = JoinedLinear(d_model, (d_model, kv_width, kv_width))
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.output_proj = Linear(d_model, d_model)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        packed: Documents | None = None,
    ) -> Tensor:
        """Attend to this and earlier positions; cos, sin (T, K / 2) are the angles of the positions of `x`.

        `packed` confine attention to documents, see `kernels.documents`.
        """
        q, k, v = self._heads(self.qkv_proj(x), cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.output_proj(attention(q, k, v, document_ids=packed).transpose(1, 2).flatten(-2))

    def _heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # (B, T, (H + 2 Hkv) K) -> q (B, H, T, K), k and v (B, Hkv, T, K), normalised and rotated.
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self.rope and self.q_norm is None:
            return rope_qkv(qkv, cos, sin, heads, kv_heads)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([heads, kv_heads, kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.rope:
            q, k = rope_qk(q, k, cos, sin)
        return q, k, v
