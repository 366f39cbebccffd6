"""Every op in a few lines of plain PyTorch: the specification, the CPU path and the test oracle.

Half precision is computed in float32 and rounded once, at the end. Shapes: `B` batch, `T` sequence, `D` d_model,
`H` / `Hkv` query / key-value heads, `K` head dim, `F` d_ff, `V` vocabulary.
"""

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dispatch import is_forward_mode
from .loss_options import LossOptions, Reduction

Casting = Literal["float32", "llama"]
GeluApproximation = Literal["none", "tanh"]
RopeLayout = Literal["interleaved", "half"]


def _widen(x: Tensor) -> Tensor:
    # float64 is not narrowed: gradcheck and the oracles need it.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _normalise(wide: Tensor, weight: Tensor | None, eps: float, casting: Casting, offset: float, dtype: torch.dtype) -> Tensor:
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if casting == "llama":
        normalised = _widen(normalised.to(dtype))
    if weight is not None:
        normalised = normalised * (_widen(weight) + offset if offset else _widen(weight))
    return normalised.to(dtype)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, casting: Casting = "float32", offset: float = 0.0
) -> Tensor:
    """Scale each row to unit root mean square, then by offset + weight (Zhang & Sennrich 2019, eq. 4).

    x (..., D), weight (D) -> (..., D) in the dtype of `x`. casting="llama" also rounds before the weight is applied.
    """
    return _normalise(_widen(x), weight, eps, casting, offset, x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    casting: Casting = "float32",
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalize the sum: (..., D), (..., D) -> (rms_norm(sum), sum).

    The sum is rounded to the dtype of `residual` and then normalized. The first result has the dtype of `x`.
    """
    total = (x + residual).to(residual.dtype)
    return _normalise(_widen(total), weight, eps, casting, offset, x.dtype), total


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Shift each row to mean 0 and scale it to variance 1, then by `weight`, then add `bias` (Ba, Kiros & Hinton 2016, eq. 4).

    x (..., D), weight (D), bias (D) -> (..., D) in the dtype of `x`. The variance is the mean squared deviation, over D.
    """
    wide = _widen(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        normalised = normalised * _widen(weight)
    if bias is not None:
        normalised = normalised + _widen(bias)
    return normalised.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020, eq. 6), elementwise; with `up` omitted, `gate` is packed (..., 2F).

    gate, up (..., F) -> (..., F) in the dtype that PyTorch promotes both to.
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.silu(_widen(gate)) * _widen(up)).to(torch.promote_types(gate.dtype, up.dtype))


def geglu(gate: Tensor, up: Tensor | None = None, approximate: GeluApproximation = "tanh") -> Tensor:
    """Return gelu(gate) * up (Shazeer 2020, eq. 7), elementwise; with `up` omitted, `gate` is packed (..., 2F).

    gate, up (..., F) -> (..., F) in the dtype that PyTorch promotes both to. approximate="none" uses the error function.
    """
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.gelu(_widen(gate), approximate=approximate) * _widen(up)).to(torch.promote_types(gate.dtype, up.dtype))


def _angles(table: Tensor, x: Tensor, positions: Tensor | None, offset: int) -> Tensor:
    # The rows of cos or sin for the tokens of x: (T, R / 2) or (B, 1, ..., 1, T, R / 2).
    if positions is None:
        return table[offset : offset + x.shape[-2]]
    positions = positions[0] if positions.dim() == 2 and positions.shape[0] == 1 else positions
    rows = table[positions.clamp(0, table.shape[0] - 1)].masked_fill((positions >= table.shape[0])[..., None], torch.nan)
    return rows if positions.dim() == 1 else rows[(slice(None), *(None,) * (x.dim() - 3))]


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, eq. 34).

    x (..., T, K); cos, sin (positions, R / 2), which get no gradient. The first R channels are rotated, the others are copied.
    positions (T), (1, T) or, for x (B, ..., T, K), (B, T); default offset .. offset + T - 1. A position below 0 is padding and
    counts as 0; one past the tables gives NaN. The pairs are neighbors (2i, 2i + 1) as in RoFormer, or, with layout="half",
    (i, i + R / 2) as in Llama checkpoints.
    """
    cos, sin = (_angles(table.detach(), x, positions, offset) for table in (cos, sin))
    rotary_dim = 2 * cos.shape[-1]
    wide = _widen(x if rotary_dim == x.shape[-1] else x[..., :rotary_dim])
    if layout == "interleaved":
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    elif layout == "half":
        first, second = wide.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    else:
        raise ValueError(f"layout {layout!r} is unknown: choose 'interleaved' or 'half'")
    rotated = rotated.to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Apply `rope` to queries (B, H, T, K) and keys (B, Hkv, T, K) with the same angles."""
    return rope(q, cos, sin, positions, layout, offset), rope(k, cos, sin, positions, layout, offset)


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection (B, T, (H + 2 Hkv) K) into q (B, H, T, K), k and v (B, Hkv, T, K); apply `rope` to q and k."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    # A view of v would keep the projection alive.
    return *rope_qk(q, k, cos, sin, positions, layout, offset), v.clone()


Window = int | tuple[int, int] | None


def window_sides(window: Window, causal: bool) -> tuple[int, int] | None:
    """Return the numbers of keys that a query sees before and after its own key, -1 for all; None if nothing is excluded."""
    if window is None:
        return None
    left, right = (window - 1, 0 if causal else window - 1) if isinstance(window, int) else window
    # Clamp, so that the sum with an int64 position does not overflow.
    return None if left < 0 and right < 0 else (min(left, 2**62), min(right, 2**62))


def attention_mask(
    num_queries: int,
    num_keys: int,
    causal: bool = True,
    window: Window = None,
    document_ids: Tensor | None = None,
    device: torch.device | None = None,
    cache_lengths: Tensor | None = None,
) -> Tensor:
    """Return a boolean mask, true where a query sees a key: (T, S), or (B, 1, T, S) with documents or lengths.

    Queries are aligned to the end of the keys, as with a cache. With `cache_lengths` (B), they are aligned to the end of the
    first cache_lengths[b] keys of sequence b. A window n keeps a query's own key and the n - 1 keys before it (and after it, if
    not causal). A window (left, right) keeps that many keys before and after its own, -1 for all. `document_ids` (B, S)
    confines attention to documents, which are runs of equal ids.
    """
    length = num_keys if cache_lengths is None else cache_lengths.long().clamp(0, num_keys)[:, None, None, None]
    query = torch.arange(num_queries, device=device)[:, None] + (length - num_queries)
    key = torch.arange(num_keys, device=device)[None, :]
    mask = key <= query if causal else (key < length).expand(*query.shape[:-1], num_keys)
    left, right = window_sides(window, causal) or (-1, -1)
    if left >= 0:
        mask = mask & (key >= query - left)
    if right >= 0:
        mask = mask & (key <= query + right)
    if document_ids is not None:
        run = F.pad((document_ids[:, 1:] != document_ids[:, :-1]).cumsum(dim=1), (1, 0))
        own = query.expand(run.shape[0], 1, num_queries, 1)[:, 0, :, 0]
        run_of_query = run.gather(1, own.clamp(min=0)).masked_fill(own < 0, -1)
        mask = mask & (run_of_query[:, None, :, None] == run[:, None, None, :])
    return mask


def packed_mask(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int, causal: bool = True, window: Window = None
) -> Tensor:
    """Return a boolean mask (T, S), true where a query sees a key of its own document.

    The last query of a document is aligned to its last key. Cumulative lengths (documents + 1) are given for queries and for
    keys; tokens after the last length form one more document.
    """

    def place(cu_seqlens: Tensor, size: int) -> tuple[Tensor, Tensor]:
        ends = F.pad(cu_seqlens.long().clamp(max=size), (0, 1), value=size)
        row = torch.arange(size, dtype=ends.dtype, device=ends.device)
        document = torch.searchsorted(ends, row, right=True)
        return document, row - ends[document]

    (document, query), (document_k, key) = place(cu_seqlens, num_queries), place(cu_seqlens_k, num_keys)
    ahead = key[None, :] - query[:, None]
    mask = document[:, None] == document_k[None, :]
    left, right = window_sides(window, causal) or (-1, -1)
    if causal:
        mask = mask & (ahead <= 0)
    if left >= 0:
        mask = mask & (ahead >= -left)
    if right >= 0:
        mask = mask & (ahead <= right)
    return mask


class _MaskedProduct(torch.autograd.Function):
    # p (..., M, N), 0 where the mask excludes a pair, times x (..., N, K). A row of x that is not finite gives NaN only in the
    # result rows that see it; in a plain product, 0 * NaN would give NaN in all rows.
    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        bad = ~x.isfinite().all(dim=-1)
        return p.masked_fill(mask & bad[..., None, :], torch.nan) @ x.nan_to_num(0.0, 0.0, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        p, x, mask = ctx.saved_tensors
        (gradient,) = gradients
        of_p = (gradient @ x.mT).masked_fill(~mask, 0.0)
        return of_p, _masked_product(p.mT, gradient, mask.mT), None


class _MaskedScores(torch.autograd.Function):
    # q (..., M, K), k (..., N, K) -> q k^T; the gradient of pairs that the mask excludes is 0.
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return q @ k.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        q, k, mask = ctx.saved_tensors
        # Fill with 0: if an excluded score is NaN, the derivative of a scale or softcap turns its gradient 0 into NaN.
        ds = gradients[0].masked_fill(~mask, 0.0)
        return _masked_product(ds, k, mask), _masked_product(ds.mT, q, mask.mT), None


def _masked_product(p: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    # Dynamo cannot trace a Function with a forward-mode rule, so forward mode calls the product directly.
    if is_forward_mode():
        return _MaskedProduct.forward(p, x, mask)
    return _MaskedProduct.apply(p, x, mask)  # pyright: ignore[reportReturnType]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    document_ids: Any = None,
    cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    cache_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention, softmax(scale * q k^T) v (Vaswani et al. 2017, eq. 1), with the scores materialized.

    q (B, H, T, K); k (B, Hkv, S, K), v (B, Hkv, S, V), H a multiple of Hkv -> (B, H, T, V). The default scale is 1 / sqrt(K).
    A softcap c maps a score s to c tanh(s / c). Packed documents are given as `document_ids` (B, S), as `Documents`, or as
    `cu_seqlens` (documents + 1), the cumulative lengths of FlashAttention's varlen form; `cu_seqlens_k` gives the lengths of
    the keys if they differ. `sinks` (H) are the scores of one more key with value 0; -inf means no sink. With `cache_lengths`
    (B), sequence b has only the first cache_lengths[b] keys. A fully masked row gives 0, and -inf in lse (B, H, T), the
    log-sum-exp of the scores. Masked values do not reach the result, not even as NaN.
    """
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if cu_seqlens is not None and cu_seqlens_k is None:
        tokens = torch.arange(num_keys, device=q.device)
        document_ids = torch.searchsorted(cu_seqlens.long(), tokens, right=True).expand(k.shape[0], -1)
    elif isinstance(document_ids, tuple):
        # The start of a document serves as its id.
        document_ids = document_ids[0]
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (_widen(k), _widen(v)))
    if cu_seqlens is not None and cu_seqlens_k is not None:
        mask = packed_mask(cu_seqlens, cu_seqlens_k, num_queries, num_keys, causal, window)
    else:
        mask = attention_mask(num_queries, num_keys, causal, window, document_ids, q.device, cache_lengths)
    products = _widen(q) @ k.mT if is_forward_mode() else _MaskedScores.apply(_widen(q), k, mask)
    scores = products * (q.shape[-1] ** -0.5 if scale is None else scale)  # pyright: ignore
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Finite, so that the gradient of a fully masked row has no NaN.
    least = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, least)
    sees = mask.any(dim=-1)
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None]
        scores = torch.cat([scores, sinks.clamp(min=least).expand(*scores.shape[:3], 1)], dim=-1)
        sees = sees | ~(sinks[..., 0] == -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)[..., :num_keys].masked_fill(~mask, 0.0)
    o = _masked_product(probabilities, v, mask).to(q.dtype)
    if not return_lse:
        return o
    # PyTorch's logsumexp needs at least one score.
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] > 0 else scores.sum(dim=-1)
    return o, lse.masked_fill(~sees, -torch.inf)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    wide = _widen(logits)
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


class _FillIgnored(torch.autograd.Function):
    """Fill rows of logits (N, V): 0 if the target (N) is -100, NaN if it is not `valid` (N).

    Rows with target -100 pass no gradient. A masked_fill would save its mask too; this saves only the targets.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        ignored = targets == -100
        fill = torch.where(ignored, 0.0, torch.nan).to(logits.dtype)
        return torch.where((valid & ~ignored)[:, None], logits, fill[:, None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].masked_fill((ctx.saved_tensors[0] == -100)[:, None], 0.0), None, None


def _fill_ignored(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    read = _FillIgnored.forward if is_forward_mode() else _FillIgnored.apply
    return read(logits, targets, valid)  # pyright: ignore[reportReturnType]


def _token_losses(logits: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # logits (N, V), targets (N) -> losses (N); lse (N) or None; predictions (N) or None.
    counted = targets != options.ignore_index
    valid = (targets >= 0) & (targets < logits.shape[-1])
    predictions = None
    if options.return_accuracy or options.return_predictions:
        predictions = logits.argmax(dim=-1).masked_fill(logits.isnan().any(dim=-1), -1)
    targets = targets.masked_fill(~valid, 0).masked_fill(~counted, -100)
    read = _capped(_fill_ignored(logits, targets, valid), options.softcap)
    weights, smoothing = options.class_weights, options.label_smoothing
    weights = None if weights is None else weights.to(read.dtype)
    losses = F.cross_entropy(read, targets, weights, label_smoothing=smoothing, reduction="none")
    lse = None
    if options.has_z_loss or options.return_lse or options.return_z_loss:
        lse = torch.logsumexp(read, dim=-1)
        if options.has_z_loss:
            factors = options.z_loss if weights is None else options.z_loss * weights[targets.clamp(min=0)]
            losses = losses + (factors * lse.square()).masked_fill(~counted, 0.0)
        if options.return_lse or options.return_z_loss:
            lse = torch.where(counted & valid, lse, torch.logsumexp(_capped(logits.detach(), options.softcap), dim=-1))
    return losses, lse, predictions


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    *,
    class_weights: Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predictions: bool = False,
    return_z_loss: bool = False,
) -> Any:
    """Return the negative log-likelihood of `targets` under softmax(logits), in float32.

    logits (..., V), targets (...) integers -> a scalar, or (...) with reduction="none". With one of the `return_` options the
    result is a `CrossEntropyOutput`. Ignored targets give 0 and do not count in the mean; if all are ignored, the mean is 0.
    Label smoothing follows Szegedy et al. 2016, section 7. The z-loss adds z_loss * lse^2 (PaLM, section 5). A softcap c maps
    a logit l to c tanh(l / c) (Gemma 2, section 2). Class weights are as in PyTorch, and the weight of the target also
    multiplies the z-loss.
    """
    flags = (return_lse, return_accuracy, return_predictions, return_z_loss)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, class_weights, *flags)
    rows = logits.reshape(targets.numel(), logits.shape[-1])
    losses, *more = _token_losses(rows, targets.reshape(-1).long(), options)
    return options.output(
        losses.view(targets.shape), targets, reduction, *(None if x is None else x.view(targets.shape) for x in more)
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predictions: bool = False,
    return_z_loss: bool = False,
    memory_budget: int = 512 * 2**20,
    num_classes: int | None = None,
) -> Any:
    """Compute `cross_entropy(x @ weight.T + bias, targets)` in chunks of rows, with `memory_budget` bytes of logits at a time.

    x (..., D), weight (V, D), bias (V), targets (...). Weight and bias are cast to the dtype of x. If all logits fit in the
    budget, they are saved for the backward pass; otherwise the backward pass recomputes each chunk. Rows of weight from
    `num_classes` on are padding.
    """
    flags = (return_lse, return_accuracy, return_predictions, return_z_loss)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, class_weights, *flags)
    rows, flat_targets = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1).long()
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    chunk_rows = max(1, memory_budget // (4 * weight.shape[0]))

    def chunk_losses(chunk: Tensor, chunk_targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _token_losses(F.linear(chunk, weight, bias)[:, :num_classes], chunk_targets, options)

    if rows.shape[0] <= chunk_rows:
        parts = [chunk_losses(rows, flat_targets)]
    else:
        chunks = zip(rows.split(chunk_rows), flat_targets.split(chunk_rows), strict=True)
        parts = [checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks]
    losses, *more = (None if part[0] is None else torch.cat(part).view(targets.shape) for part in zip(*parts, strict=True))
    assert losses is not None
    return options.output(losses, targets, reduction, *more)


def _groups(ends: Tensor) -> list[slice]:
    bounds = [0, *ends.tolist()]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix: x (N, K), weight (E, F, K), ends (E) -> (N, F)."""
    return torch.cat([x[rows] @ matrix.mT for rows, matrix in zip(_groups(ends), weight, strict=True)])


def grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Sum y x^T over the rows of each group: y (N, F), x (N, K), ends (E) -> (E, F, K)."""
    return torch.stack([y[rows].mT @ x[rows] for rows in _groups(ends)])
