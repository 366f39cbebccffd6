"""Gradients of attention over a subset of the keys. Ring attention sums them over the processes."""

import torch
from torch import Tensor

from .. import reference
from ..dispatch import use_triton
from .choice import get_attention_kernel
from .op import _attention_backward


def partial_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) for a subset of the keys. The full dq is the sum over all subsets.

    k and v (B, Hkv, S, K) are the subset. o (B, H, T, K) and lse (B, H, T) float32 are the results over all keys, and do is the
    gradient of o. The other arguments are the same as in `attention`.
    """
    if use_triton(q):
        # The kernels recompute the probabilities from lse, so they do not need the other keys.
        options = (causal, scale, None, softcap, "ieee", get_attention_kernel(), None, None, None)
        return _attention_backward(do, None, q, k, v, o, lse, None, None, None, *options)[:3]
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        own, own_lse = reference.attention(q, k, v, causal, scale, softcap=softcap, return_lse=True)
    # o is the sum of w_i o_i over the subsets, with w_i = exp(lse_i - lse). This gives the gradients of o_i and lse_i.
    weight = torch.exp(own_lse.detach() - lse)[..., None]
    weighted = weight * do
    dlse = (weighted * (own.detach() - o)).sum(dim=-1)
    dq, dk, dv = torch.autograd.grad((own, own_lse), (q, k, v), (weighted.to(own.dtype), dlse.to(own_lse.dtype)))
    return dq, dk, dv
