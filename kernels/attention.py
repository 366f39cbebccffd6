"""Causal softmax attention: PyTorch's fused kernels where they cover the case, the reference elsewhere."""

import torch.nn.functional as F
from torch import Tensor

from . import reference


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
    """Softmax attention, softmax(scale * q k^T) v (Vaswani et al. 2017, eq. 1).

    q (B, H, T, K); k, v (B, Hkv, S, K) with H a multiple of Hkv -> (B, H, T, K). With fewer queries than keys (a cache) the
    queries are the last ones. Scale is 1 / sqrt(K) unless given; a window of n keeps a query's own key and the n - 1
    before it; softcap c turns a score s into c tanh(s / c); `document_ids` (B, T) or `cu_seqlens` (documents + 1) confine
    attention to packed documents. A fully masked row gives 0.
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads, k has {num_kv_heads}: allowed is a divisor of {num_heads}")
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if num_queries > num_keys and causal:
        raise ValueError(f"{num_queries} queries for {num_keys} keys: causal attention needs at least one key a query")
    if cu_seqlens is not None and document_ids is not None:
        raise ValueError("document_ids and cu_seqlens say the same thing: give one of them")
    # One query sees every key, so a decoding step needs no mask; other offsets of queries to keys are not SDPA's.
    plain = window is None and softcap is None and document_ids is None and cu_seqlens is None
    if plain and (not causal or num_queries in (1, num_keys)):
        is_causal = causal and num_queries > 1
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=num_heads != num_kv_heads
        )  # fmt: skip
    return reference.attention(q, k, v, causal, scale, window, softcap, document_ids, cu_seqlens)
