"""Functions of the Transformer that need no kernel: PyTorch's `softmax` and `silu`, and attention with an arbitrary mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, softmax
from torch.nn.functional import silu

__all__ = ["scaled_dot_product_attention", "silu", "softmax"]


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v over the keys whose mask is True (Vaswani et al. 2017, eq. 1).

    q (..., T, K), k (..., S, K), v (..., S, V), mask (..., T, S) boolean -> (..., T, V). Without a mask each query attends to
    all keys. A query that attends to no key gives 0. `kernels.attention` is faster for causal masks, windows and documents.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}: expected torch.bool, True where a query attends to a key")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
