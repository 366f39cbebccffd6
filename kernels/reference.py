"""Every op in plain PyTorch, a few lines each: the specification, the CPU path, and the oracle of the tests.

Half precision is computed in float32 and rounded once, at the end. Shapes: `B` batch, `T` sequence, `D` d_model,
`H` / `Hkv` query / key-value heads, `K` head dim, `F` d_ff, `V` vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Reduction = Literal["none", "mean", "sum"]
RopeLayout = Literal["interleaved", "half"]


def _widen(x: Tensor) -> Tensor:
    # float64 stays as it is: gradcheck and the oracles need it.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Scale each row to unit root mean square, then by `weight` (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D) -> (..., D) in the dtype of `x`.
    """
    wide = _widen(x)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * _widen(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: (..., D), (..., D) -> (rms_norm(sum), sum)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, eq. 6), elementwise; with `up` omitted, `gate` is packed (..., 2F)."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.silu(_widen(gate)) * _widen(up)).to(gate.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, layout: RopeLayout = "interleaved") -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, eq. 34).

    x (..., T, K); cos, sin (positions, K / 2); positions (T) or (B, T), by default 0 .. T - 1. Pairs are neighbours
    (2i, 2i + 1) as in RoFormer, or with layout="half" (i, i + K / 2) as in Llama checkpoints.
    """
    cos, sin = (table[: x.shape[-2]] if positions is None else table[positions] for table in (cos, sin))
    if positions is not None and positions.dim() > 1:
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (B, 1, T, K / 2): one angle for all heads
    wide = _widen(x)
    if layout == "interleaved":
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    elif layout == "half":
        first, second = wide.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    else:
        raise ValueError(f"layout {layout!r} is unknown: choose 'interleaved' or 'half'")
    return rotated.to(x.dtype)


def attention_mask(
    num_queries: int,
    num_keys: int,
    causal: bool = True,
    window: int | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return which keys each query may see, as a boolean (num_queries, num_keys), or (B, 1, T, T) with documents.

    Queries are aligned to the end of the keys, as with a cache. A window of n keeps a query's own key and the n - 1
    before it. `document_ids` (B, T) confines attention to tokens of one document.
    """
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    mask = key <= query if causal else torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (key > query - window)
        if not causal:
            mask = mask & (key < query + window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    document_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Softmax attention, softmax(scale * q k^T) v (Vaswani et al. 2017, eq. 1), the scores written out.

    q (B, H, T, K); k, v (B, Hkv, S, K) with H a multiple of Hkv -> (B, H, T, K). Scale is 1 / sqrt(K) unless given;
    softcap c turns a score s into c tanh(s / c). Packed documents come as `document_ids` (B, T), or as `cu_seqlens`
    (documents + 1), the cumulative lengths of FlashAttention's varlen form. A fully masked row gives 0.
    """
    if cu_seqlens is not None:
        tokens = torch.arange(q.shape[-2], device=q.device)
        document_ids = torch.searchsorted(cu_seqlens, tokens, right=True).expand(q.shape[0], -1)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (_widen(k), _widen(v)))
    scores = _widen(q) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = attention_mask(q.shape[-2], k.shape[-2], causal, window, document_ids, q.device)
    # Where nothing is left to attend to, softmax over finite scores keeps the gradient free of NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    return (probabilities @ v).to(q.dtype)


def _reduce(losses: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        # The count stays on the device: reading it here would stall the GPU.
        return losses.sum() / counted.sum().clamp(min=1)
    raise ValueError(f"reduction {reduction!r} is unknown: choose 'none', 'mean' or 'sum'")


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood of `targets` under softmax(logits), in float32.

    logits (..., V), targets (...) integers -> a scalar, or (...) with reduction="none". Ignored targets give 0 and do not
    count in the mean; where all are ignored the mean is 0. Label smoothing as in Szegedy et al. 2016, eq. 3; z-loss adds
    z_loss * lse^2 (PaLM, section 5); softcap c turns a logit l into c tanh(l / c) (Gemma 2, section 2).
    """
    logits = _widen(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    losses = F.cross_entropy(rows, flat_targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    losses, counted = losses.view(targets.shape), targets != ignore_index
    if z_loss:
        losses = losses + (z_loss * torch.logsumexp(logits, dim=-1).square()).masked_fill(~counted, 0.0)
    return _reduce(losses, counted, reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    memory_budget: int = 256 * 2**20,
) -> Tensor:
    """`cross_entropy(x @ weight.T, targets)` that holds the logits of a few rows at a time, at most `memory_budget` bytes.

    x (..., D), weight (V, D), targets (...). Where all logits fit in the budget they are kept for the backward pass;
    else each chunk of rows is computed again there.
    """
    rows, flat_targets = x.flatten(0, -2), targets.flatten()
    chunk_rows = max(1, memory_budget // (4 * weight.shape[0]))

    def chunk_losses(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
        return cross_entropy(F.linear(chunk, weight), chunk_targets, ignore_index, label_smoothing, z_loss, softcap, "none")

    if rows.shape[0] <= chunk_rows:
        losses = chunk_losses(rows, flat_targets)
    else:
        chunks = zip(rows.split(chunk_rows), flat_targets.split(chunk_rows), strict=True)
        losses = torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])  # pyright: ignore
    return _reduce(losses.view(targets.shape), targets != ignore_index, reduction)
