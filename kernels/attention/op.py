"""The registered op and the public function."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..dispatch import use_triton
from ..registration import custom_op
from .backward import launch_backward
from .configurations import MAX_HEAD_DIM
from .decode import fits_decode, launch_decode
from .forward import launch_forward
from .intervals import cu_seqlens_bounds, document_bounds
from .options import Options
from .tiles import with_unit_stride

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _empty_like(x: Tensor, shape: torch.Size) -> Tensor:
    # Laid out as (B, T, H, K) where x is: the heads of a projection, whose outputs are joined again without a copy.
    batch, heads, tokens, head_dim = shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    return x.new_empty(shape)


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
    window: int | None,
    softcap: float | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    options = Options(causal, scale, window, softcap, precision, begins, ends)  # pyright: ignore[reportArgumentType]
    o, lse = _empty_outputs(q, k, v)
    q, k, v = map(with_unit_stride, (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    if q.numel() > 0:
        launch = launch_decode if fits_decode(q, k, options) else launch_forward
        launch(q, k, v, o, lse, sinks, options)
    return o, lse


@_attention.register_fake
def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q, q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


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
    window: int | None,
    softcap: float | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(causal, scale, window, softcap, precision, begins, ends)  # pyright: ignore[reportArgumentType]
    dq, dk, dv, dsinks = _empty_gradients(do, dlse, q, k, v, o, lse, sinks)
    do, q, k, v, o = map(with_unit_stride, (do, q, k, v, o))
    if q.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks.zero_()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    launch_backward(do, dlse, q, k, v, o, lse, dq, dk, dv, delta, options)
    if sinks is not None:
        # The sink's value is 0, so dP of its column is 0 and dS = -P delta.
        weights = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
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
    q, k, v, sinks, begins, ends, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, begins, ends)
    ctx.set_materialize_grads(False)


def _backward(ctx, do: Tensor | None, dlse: Tensor | None):
    q, k, v, o, lse, sinks, begins, ends = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    dq, dk, dv, dsinks = _attention_backward(do, dlse, q, k, v, o, lse, sinks, begins, ends, *ctx.options)
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * 7


_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.tilewright.attention)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    # All pairs of queries and keys, whatever the mask: PyTorch's convention for its own. `costs.attention` counts exactly.
    return 4 * q_shape.numel() * k_shape[2]


@register_flop_formula(torch.ops.tilewright.attention_backward)
def _backward_flops(do_shape, dlse_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    # Five products, as PyTorch counts: the scores again, dV, dP, dQ, dK. That two of them run twice is not useful work.
    return 10 * q_shape.numel() * k_shape[2]


def _check(q, k, v, scale, window, softcap, sinks, document_ids, cu_seqlens) -> None:
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}: allowed are (B, H, T, K), and (B, Hkv, S, K) for k and v")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: allowed is a divisor of {q.shape[1]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: allowed is one dtype for all")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: allowed is a finite number")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: allowed is 1 or more, the query's own key among them")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}: allowed is a finite number above 0")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}: allowed is ({q.shape[1]},), one a query head")
    if cu_seqlens is not None and document_ids is not None:
        raise ValueError("document_ids and cu_seqlens say the same thing: give one of them")
    if (cu_seqlens is not None or document_ids is not None) and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries for {k.shape[2]} keys: with documents each query needs a key of its own")
    if document_ids is not None and document_ids.shape != (k.shape[0], k.shape[2]):
        allowed = (k.shape[0], k.shape[2])
        raise ValueError(f"document_ids has shape {tuple(document_ids.shape)}: allowed is {allowed}, one a key")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)):
        is_what = f"has shape {tuple(cu_seqlens.shape)} and is {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens {is_what}: allowed is one row of torch.int32 or torch.int64")
    others = {"k": k, "v": v, "sinks": sinks, "document_ids": document_ids, "cu_seqlens": cu_seqlens}
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device}: allowed is {q.device}, the device of q")


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
    sinks: Tensor | None = None,
    *,
    return_lse: bool = False,
    allow_tf32: bool = False,
) -> Any:
    """Softmax attention, softmax(scale * q k^T) v (Vaswani et al. 2017, eq. 1), that never holds the T x S scores.

    q (B, H, T, K); k, v (B, Hkv, S, K) with H a multiple of Hkv -> o (B, H, T, K), or (o, lse) with lse (B, H, T) float32,
    the log of the sum of exponentials of a row's scores. Queries are the last T of S positions, as with a cache; one without
    any key gives 0 and an lse of -inf. Scale is 1 / sqrt(K) unless given; a window of n keeps a query's own key and the n - 1
    before it (and after it, where not causal); softcap c turns a score s into c tanh(s / c) (Gemma 2, section 2). `sinks` (H)
    are scores of one more key of value 0 that every query of a head sees (Xiao et al. 2023). `document_ids` (B, S), of which a
    run of equal ids is a document, or `cu_seqlens` (documents + 1), cumulative lengths of every sequence alike, confine
    attention to packed documents; tiles between documents are not visited.

    float16, bfloat16 and float32, K up to 256; sums are in float32; float64 runs the reference. `allow_tf32` rounds float32
    factors to TF32. Any strides: copied are tensors whose channels are no neighbours, and those in half precision whose
    tokens do not begin on 16 bytes. Gradients flow to q, k, v and sinks, and from lse too. Equal calls give equal bits; with
    few queries against many keys the order of sums follows the batch and the GPU.
    """
    kind = q.device.type
    # Of the devices that hold tensors "meta" alone has no autocast. PyTorch 2.11 cannot compile a question whether one has.
    if kind != "meta" and torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    _check(q, k, v, scale, window, softcap, sinks, document_ids, cu_seqlens)
    if not use_triton(q) or q.dtype == torch.float64:
        return _without_triton(q, k, v, causal, scale, window, softcap, document_ids, cu_seqlens, sinks, return_lse)
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}: allowed are {', '.join(map(str, DTYPES))}")
    if not 0 < q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"the head dim is {q.shape[3]}: allowed is 1 to {MAX_HEAD_DIM}")
    begins = ends = None
    if document_ids is not None:
        begins, ends = document_bounds(document_ids)
    elif cu_seqlens is not None:
        begins, ends = cu_seqlens_bounds(cu_seqlens, k.shape[0], k.shape[2])
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    softcap = None if softcap is None else float(softcap)
    precision = "tf32" if allow_tf32 else "ieee"
    o, lse = _attention(q, k, v, sinks, begins, ends, causal, scale, window, softcap, precision)
    return (o, lse) if return_lse else o


def _without_triton(q, k, v, causal, scale, window, softcap, document_ids, cu_seqlens, sinks, return_lse) -> Any:
    # PyTorch's fused kernels where they cover the case. One query sees every key, so a decoding step needs no mask; other
    # offsets of queries to keys are not theirs.
    special = any(option is not None for option in (window, softcap, document_ids, cu_seqlens, sinks))
    if not special and not return_lse and k.shape[2] > 0 and (not causal or q.shape[2] in (1, k.shape[2])):
        is_causal = causal and q.shape[2] > 1
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )  # fmt: skip
    return reference.attention(q, k, v, causal, scale, window, softcap, document_ids, cu_seqlens, sinks, return_lse=return_lse)
