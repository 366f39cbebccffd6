"""The registered custom op and the public `attention` function."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..checks import FLOATING, INTEGER, check_cu_seqlens, check_device, check_dtype, check_int, check_number
from ..dispatch import autocast_dtype, is_transformed, use_triton
from ..registration import custom_op
from .choice import get_attention_kernel
from .configurations import MAX_HEAD_DIM
from .decode import fits_decode, launch_decode
from .launches import launch_backward, launch_forward
from .operands import with_unit_stride
from .options import Options
from .packing import Documents, cross_intervals, documents


def _empty_like(x: Tensor, shape: torch.Size) -> Tensor:
    # Keep a (B, T, H, K) memory layout, as projections produce it, so that the heads merge again without a copy.
    batch, heads, tokens, head_dim = shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    return x.new_empty(shape)


def _options(causal, scale, window, softcap, precision, kernel, *tensors) -> Options:
    return Options(causal, scale, None if window is None else tuple(window), softcap, precision, kernel, *tensors)


@custom_op("attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    begins: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    scale: float,
    window: Sequence[int] | None,
    softcap: float | None,
    precision: str,
    kernel: str,
    lengths: Tensor | None,
    query_begins: Tensor | None,
    query_ends: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = (begins, ends, lengths, query_begins, query_ends)
    options = _options(causal, scale, window, softcap, precision, kernel, *tensors)
    o, lse = _empty_outputs(q, k, v)
    q, k, v = map(with_unit_stride, (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    if o.numel() > 0:
        launch = launch_decode if fits_decode(q, k, options) else launch_forward
        launch(q, k, v, o, lse, sinks, options)
    return o, lse


@_attention.register_fake
def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q, torch.Size([*q.shape[:3], v.shape[3]])), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("attention_backward")
def _attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    begins: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    scale: float,
    window: Sequence[int] | None,
    softcap: float | None,
    precision: str,
    kernel: str,
    lengths: Tensor | None,
    query_begins: Tensor | None,
    query_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (begins, ends, lengths, query_begins, query_ends)
    options = _options(causal, scale, window, softcap, precision, kernel, *tensors)
    dq, dk, dv, dsinks = _empty_gradients(do, dlse, q, k, v, o, lse, sinks)
    do, q, k, v, o = map(with_unit_stride, (do, q, k, v, o))
    if q.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks.zero_()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    launch_backward(do, dlse, q, k, v, o, lse, dq, dk, dv, delta, options)
    if sinks is not None:
        # A sink's value is 0, so its column of dP is 0 and dS = -P delta.
        weights = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        # A query without keys has an output of 0, so its `do` contributes nothing.
        delta = torch.where(o.any(dim=-1), delta, 0.0 if dlse is None else -dlse)
        dsinks = -(weights * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


@_attention_backward.register_fake
def _empty_gradients(do, dlse, q, k, v, o, lse, sinks, *_):
    return (
        _empty_like(q, q.shape),
        _empty_like(k, k.shape),
        _empty_like(v, v.shape),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _save(ctx, inputs, output) -> None:
    q, k, v, sinks, begins, ends, *ctx.options, lengths, query_begins, query_ends = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, begins, ends, lengths, query_begins, query_ends)
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor | None, dlse: Tensor | None):
    q, k, v, o, lse, sinks, begins, ends, *others = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dq, dk, dv, dsinks = _attention_backward(do, dlse, q, k, v, o, lse, sinks, begins, ends, *ctx.options, *others)
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 11


_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.tilewright.attention)
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    # Counts all pairs of queries and keys regardless of the mask, as PyTorch does. `record.py` counts exactly.
    return 2 * q_shape[:3].numel() * k_shape[2] * (q_shape[3] + v_shape[3])


@register_flop_formula(torch.ops.tilewright.attention_backward)
def _backward_flops(do_shape, dlse_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    # Five products, as PyTorch counts them: the recomputed scores, dV, dP, dQ, dK. The two that run twice count once.
    return 2 * q_shape[:3].numel() * k_shape[2] * (3 * q_shape[3] + 2 * v_shape[3])


def _check(q, k, v, scale, window, softcap, sinks, document_ids, cu_seqlens, cu_seqlens_k, cache_lengths) -> None:
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3] or (q.shape[0], q.shape[3]) != k.shape[::3]:
        shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: expected (B, H, T, K), (B, Hkv, S, K) and (B, Hkv, S, V)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: expected a divisor of {q.shape[1]}")
    if min(q.shape[3], v.shape[3]) == 0:
        raise ValueError(f"q has head dim {q.shape[3]}, v has head dim {v.shape[3]}: expected 1 or more")
    check_dtype(INTEGER, cache_lengths=cache_lengths)
    check_cu_seqlens(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected the same dtype for all")
    if scale is not None:
        check_number("scale", scale)
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    if isinstance(window, tuple | list):
        if len(window) != 2 or None in window:
            raise ValueError(f"window is {window}: expected an integer or a pair (left, right)")
        for side in window:
            check_int("a side of the window", side, -1)
    else:
        check_int("window", window, 1)
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}: expected ({q.shape[1]},), one per query head")
    if cu_seqlens is not None and document_ids is not None:
        raise ValueError("document_ids and cu_seqlens are both given: expected at most one of them")
    if cu_seqlens_k is not None:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens is None: cu_seqlens_k also needs the cumulative lengths of the queries")
        if cu_seqlens.shape != cu_seqlens_k.shape:
            shapes = f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, cu_seqlens_k {tuple(cu_seqlens_k.shape)}"
            raise ValueError(f"{shapes}: expected the same shape, since each document has queries and keys")
        if cache_lengths is not None:
            raise ValueError("cache_lengths and cu_seqlens_k are both given: expected at most one of them")
    elif (cu_seqlens is not None or document_ids is not None) and q.shape[2] > k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} tokens, k has {k.shape[2]}: with documents, expected no more queries than keys")
    ids = document_ids
    if isinstance(ids, Documents):
        ids.check()
        ids = ids.begins
    if ids is not None and not isinstance(ids, Tensor):
        raise ValueError(f"document_ids is a {type(ids).__name__}: expected a tensor (B, S) or a `Documents`")
    if ids is not None and ids.shape != (k.shape[0], k.shape[2]):
        allowed = (k.shape[0], k.shape[2])
        raise ValueError(f"document_ids has shape {tuple(ids.shape)}: expected {allowed}, one per key")
    if cache_lengths is not None and cache_lengths.shape != q.shape[:1]:
        raise ValueError(f"cache_lengths has shape {tuple(cache_lengths.shape)}: expected ({q.shape[0]},), one per sequence")
    packed = {"document_ids": ids, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    check_device(q=q, k=k, v=v, sinks=sinks, cache_lengths=cache_lengths, **packed)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    document_ids: Tensor | Documents | None = None,
    cu_seqlens: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    cache_lengths: Tensor | None = None,
    return_lse: bool = False,
    allow_tf32: bool = False,
) -> Any:
    """Compute softmax(scale * q k^T) v (Vaswani et al. 2017, eq. 1) without storing the T x S scores.

    q (B, H, T, K), k (B, Hkv, S, K) and v (B, Hkv, S, V) with H a multiple of Hkv give o (B, H, T, V). With `return_lse` the
    result is (o, lse), where lse (B, H, T) float32 is the log-sum-exp of each row of scores. Queries are the last T of S
    positions, as with a cache. A query that sees no key gives 0 and an lse of -inf. The default scale is 1 / sqrt(K). A softcap
    c maps a score s to c tanh(s / c) (Gemma 2, section 2). `sinks` (H) holds the score of one extra key with value 0 that every
    query of a head sees (Xiao et al. 2023); -inf disables it.

    A window of n keeps a query's own key and the n - 1 keys before it (also the n - 1 keys after it, if not causal). A window
    of (left, right) keeps that many keys before and after its own; -1 keeps all, and causal attention keeps none after it.
    `cache_lengths` (B) integers: sequence b has only its first cache_lengths[b] keys, clamped to S, and its queries are the
    last T of those.

    Packed documents do not see each other, and the kernels skip the tiles between them. Give either `document_ids` (B, S),
    where a run of equal ids is a document, or `cu_seqlens` (documents + 1), non-decreasing cumulative lengths that apply to
    every sequence. Positions before the first length, and from the last length on, are documents too. Each query is one of the
    keys, so T is at most S. With `cu_seqlens_k`, `cu_seqlens` counts queries and `cu_seqlens_k` counts keys; the last query of
    a document is aligned to its last key. `cu_seqlens_k` excludes `document_ids` and `cache_lengths`. Layers with the same
    documents can share a `Documents` object, which `documents` computes from ids or from `cu_seqlens`.

    Masked values never reach a result or a gradient, not even as NaN. A non-finite value may turn entire rows that see it to
    NaN. Without the kernels, causal attention with no other options runs PyTorch's own function, which guarantees this for
    finite values only.

    The kernels support float16, bfloat16 and float32 with K and V up to 256, and accumulate in float32. float64 runs the
    reference, including lse. `allow_tf32` rounds float32 factors to TF32. Strides are arbitrary; the op copies tensors with
    non-contiguous channels, and half-precision tensors whose tokens are not 16-byte aligned. Gradients flow to q, k, v and
    sinks, also from lse. Equal calls give equal bits; with few queries and many keys, the summation order depends on the batch
    size and the GPU.

    Raises ValueError if an argument has an unsupported shape, dtype, device or value.
    """
    check_dtype(FLOATING, q=q, k=k, v=v, sinks=sinks)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    _check(q, k, v, scale, window, softcap, sinks, document_ids, cu_seqlens, cu_seqlens_k, cache_lengths)
    if not use_triton(q):
        masks = (window, softcap, document_ids, cu_seqlens, sinks, cache_lengths)
        # A single query sees every key, so a decoding step needs no mask. PyTorch supports no other offset of queries to keys.
        if (
            all(mask is None for mask in masks)
            and not return_lse
            and not is_transformed()
            and k.shape[2] > 0
            and (not causal or q.shape[2] in (1, k.shape[2]))
        ):
            is_causal = causal and q.shape[2] > 1
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )  # fmt: skip
        options = (causal, scale, window, softcap, document_ids, cu_seqlens, sinks)
        lengths = {"cu_seqlens_k": cu_seqlens_k, "cache_lengths": cache_lengths}
        # Autocast would round the products, and give two dtypes to the backward pass, which runs without autocast.
        with nullcontext() if dtype is None else torch.autocast(q.device.type, enabled=False):
            return reference.attention(q, k, v, *options, **lengths, return_lse=return_lse)
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        raise ValueError(f"q has head dim {q.shape[3]}, v has head dim {v.shape[3]}: expected 1 to {MAX_HEAD_DIM}")
    sides = reference.window_sides(window, causal)
    begins = ends = query_begins = query_ends = None
    if cu_seqlens is not None and cu_seqlens_k is not None:
        left, right = sides or (-1, -1)
        visible = (left, 0 if causal else right)
        sizes = (k.shape[0], q.shape[2], k.shape[2])
        begins, ends, query_begins, query_ends = cross_intervals(cu_seqlens, cu_seqlens_k, *sizes, visible)
        causal, sides = False, None
    elif isinstance(document_ids, Documents):
        begins, ends = document_ids.in_rows()
    elif document_ids is not None or cu_seqlens is not None:
        begins, ends = documents(document_ids, cu_seqlens=cu_seqlens, batch=k.shape[0], num_keys=k.shape[2])
    lengths = cache_lengths
    if lengths is not None and lengths.dtype != torch.int32:
        # Clamp before the cast, so that no value overflows int32. The kernels clamp int32 lengths themselves.
        lengths = lengths.clamp(0, k.shape[2]).to(torch.int32)
    lengths = None if lengths is None else lengths.contiguous()
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    softcap = None if softcap is None else float(softcap)
    precision = "tf32" if allow_tf32 else "ieee"
    # Pass the kernel choice to the backward pass, which may run in another thread and after the choice has changed.
    options = (causal, scale, sides, softcap, precision, get_attention_kernel(), lengths, query_begins, query_ends)
    o, lse = _attention(q, k, v, sinks, begins, ends, *options)
    return (o, lse) if return_lse else o
