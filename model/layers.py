"""The layers of the Transformer: thin modules around the kernels, initialized as in CS336."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Documents, add_rms_norm, attention, fp8_linear, geglu, layer_norm, rms_norm, rope_qk, rope_qkv, swiglu
from .cache import LayerCache
from .config import FeedForward, NormType
from .sequence_parts import SequenceParts
from .sharded_weights import local

if TYPE_CHECKING:
    from .fp8 import Fp8Products


def draw_weight(weight: Tensor, in_features: int, out_features: int) -> None:
    """Initialize a weight in place from N(0, 2 / (in_features + out_features)), truncated at 3 sigma (Glorot & Bengio 2010)."""
    std = math.sqrt(2 / (in_features + out_features))
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class Linear(nn.Linear):
    """y = x W^T + b, (..., d_in) -> (..., d_out), computed in the dtype of x. There is no bias b by default.

    The weight W (d_out, d_in) is initialized by `draw_weight`, the bias to 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.fp8: Fp8Products | None = None

    def reset_parameters(self) -> None:
        """Initialize the weight and the bias."""
        self._draw()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _draw(self) -> None:
        draw_weight(self.weight, self.in_features, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the last dimension."""
        weight, bias = self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)
        if self.fp8 is not None and torch.is_grad_enabled():
            y = fp8_linear(input, weight, rowwise=self.fp8.rowwise, history=self.fp8.history)
            return y if bias is None else y + bias
        return F.linear(input, weight, bias)


class JoinedLinear(Linear):
    """Several `Linear` layers with the same input, computed as one product.

    Each part of the weight is initialized as a `Linear` layer of its own.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = False) -> None:
        self.parts = tuple(parts)
        super().__init__(in_features, sum(parts), bias)

    def _draw(self) -> None:
        for part in self.weight.split(self.parts):
            draw_weight(part, self.in_features, part.shape[0])


class Head(Linear):
    """The output projection to one logit per token; zero rows pad its weight to (num_rows, d_model)."""

    def __init__(self, d_model: int, vocab_size: int, num_rows: int) -> None:
        self.vocab_size = vocab_size
        super().__init__(d_model, num_rows)

    def reset_parameters(self) -> None:
        """Initialize the rows of the vocabulary, and set the padding to 0."""
        draw_weight(self.weight[: self.vocab_size], self.in_features, self.vocab_size)
        nn.init.zeros_(self.weight[self.vocab_size :])


class Embedding(nn.Embedding):
    """One row per token, initialized from N(0, 1) truncated at 3; zero rows pad the table to `num_rows`, if given."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_rows: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        super().__init__(vocab_size if num_rows is None else num_rows, d_model, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialize the rows of the vocabulary, and set the padding to 0."""
        nn.init.trunc_normal_(self.weight[: self.vocab_size], a=-3, b=3)
        nn.init.zeros_(self.weight[self.vocab_size :])

    def forward(self, input: Tensor) -> Tensor:
        """Look up the rows of the tokens: (...) -> (..., D)."""
        return F.embedding(input, local(self.weight))


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight: (..., D) -> (..., D). `unit_offset` scales by 1 + weight, as Gemma does."""

    def __init__(self, d_model: int, eps: float = 1e-5, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model) if unit_offset else torch.ones(d_model))
        self.eps = eps
        self.offset = float(unit_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return rms_norm(x, local(self.weight), self.eps, offset=self.offset)

    def add(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream; return the normalized sum and the sum. One kernel computes both."""
        return add_rms_norm(branch, residual, local(self.weight), self.eps, offset=self.offset)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned weight and no bias: (..., D) -> (..., D)."""

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return layer_norm(x, local(self.weight), eps=self.eps)

    def add(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add a branch to the residual stream; return the normalized sum, in the dtype of the branch, and the sum."""
        total = (branch + residual).to(residual.dtype)
        return self(total).to(branch.dtype), total


def make_norm(norm_type: NormType, d_model: int, eps: float, unit_offset: bool = False) -> RMSNorm | LayerNorm:
    """Return a new norm of the given type; only RMSNorm has `unit_offset`."""
    norms: dict[str, Callable[[], RMSNorm | LayerNorm]] = {
        "rms_norm": lambda: RMSNorm(d_model, eps, unit_offset),
        "layer_norm": lambda: LayerNorm(d_model, eps),
    }
    if norm_type not in norms:
        raise ValueError(f"norm_type is {norm_type!r}: expected {' or '.join(norms)}")
    return norms[norm_type]()


GATED_ACTIVATIONS: dict[FeedForward, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "geglu_tanh": partial(geglu, approximate="tanh"),
    "geglu_erf": partial(geglu, approximate="none"),
}
"""Activation between the products of each gated feed-forward layer: packed gate and up (..., 2F) -> (..., F)."""


class GatedLinearUnit(nn.Module):
    """The gated feed-forward layer W2(act(W1 x) * W3 x) (Shazeer 2020): (..., D) -> (..., D).

    `gate_up_proj` holds W1, then W3; `down_proj` holds W2. `activation` maps packed gate and up (..., 2F) to (..., F).
    """

    def __init__(self, d_model: int, d_ff: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up_proj = JoinedLinear(d_model, (d_ff, d_ff))
        self.down_proj = Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position."""
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class SwiGLU(GatedLinearUnit):
    """`GatedLinearUnit` with SiLU (Shazeer 2020, eq. 6)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff, swiglu)


class GEGLU(GatedLinearUnit):
    """`GatedLinearUnit` with GELU (Shazeer 2020, eq. 7): the tanh form, or the error function with approximate="none"."""

    def __init__(self, d_model: int, d_ff: int, approximate: Literal["none", "tanh"] = "tanh") -> None:
        super().__init__(d_model, d_ff, partial(geglu, approximate=approximate))


class SiLU(nn.Module):
    """The feed-forward layer without a gate, W2 silu(W1 x): (..., D) -> (..., D). `up_proj` holds W1, `down_proj` holds W2."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position."""
        return self.down_proj(F.silu(self.up_proj(x)))


def make_feed_forward(name: FeedForward, d_model: int, d_ff: int) -> nn.Module:
    """Return a new feed-forward layer of the given name."""
    layers: dict[str, Callable[[int, int], nn.Module]] = {
        "swiglu": SwiGLU,
        "geglu_tanh": GEGLU,
        "geglu_erf": partial(GEGLU, approximate="none"),
        "silu": SiLU,
    }
    if name not in layers:
        raise ValueError(f"ffn is {name!r}: expected one of {', '.join(layers)}")
    return layers[name](d_model, d_ff)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with grouped key-value heads: (B, T, D) -> (B, T, D).

    `qk_norm` normalizes each head of the queries and keys before the rotation, which bounds the scores (Dehghani et al. 2023,
    section 2). With rope=False there is no rotation. `kernels.attention` documents `window`, `scale` and `softcap`.
    """

    parts: SequenceParts | None = None
    """The part of each sequence that this process holds, under context parallelism."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        rope: bool = True,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        unit_offset_norms: bool = False,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"num_heads is {num_heads}: expected a divisor of d_model, {d_model}, or a head_dim")
        self.head_dim = head_dim or d_model // num_heads
        self.rope, self.window, self.scale, self.softcap = rope, window, scale, softcap
        q_width, kv_width = self.head_dim * self.num_heads, self.head_dim * self.num_kv_heads
        self.qkv_proj = JoinedLinear(d_model, (q_width, kv_width, kv_width), qkv_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps, unit_offset_norms) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps, unit_offset_norms) if qk_norm else None
        self.output_proj = Linear(q_width, d_model)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        cache: LayerCache | None = None,
        packed: Documents | None = None,
    ) -> Tensor:
        """Attend to this and earlier positions.

        cos, sin (T, R / 2), R <= K: the rows of `kernels.rope_tables` for the positions of `x`. With a cache that has `places`,
        pass the rows of all positions from 0. Without RoPE they are not read. `packed` restricts attention to documents
        (`kernels.documents`).
        """
        positions, lengths = (None, None) if cache is None or cache.places is None else cache.places
        q, k, v = self._heads(self.qkv_proj(x), self._tables(cos, sin), positions)
        if cache is not None:
            k, v = cache.append(k, v)
        # A window as long as the keys masks nothing.
        num_keys = k.shape[2] * (1 if self.parts is None else self.parts.cp)
        window = None if self.window is None or self.window >= num_keys else self.window
        options = {"scale": self.scale, "window": window, "softcap": self.softcap}
        if self.parts is not None and self.parts.cp > 1:
            o = self.parts.attention(q, k, v, packed, **options)
        else:
            o = attention(q, k, v, **options, document_ids=packed, cache_lengths=lengths)
        return self.output_proj(o.transpose(1, 2).flatten(-2))

    def _tables(self, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if not self.rope:
            return None
        if cos is None or sin is None:
            raise ValueError("cos or sin is None: expected the tables of kernels.rope_tables, or a layer with rope=False")
        return cos, sin

    def _heads(
        self, qkv: Tensor, tables: tuple[Tensor, Tensor] | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # (B, T, (H + 2 Hkv) K) -> q (B, H, T, K), k and v (B, Hkv, T, K), normalized and rotated.
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if tables is not None and self.q_norm is None:
            return rope_qkv(qkv, *tables, heads, kv_heads, positions)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split([heads, kv_heads, kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if tables is not None:
            q, k = rope_qk(q, k, *tables, positions)
        return q, k, v
