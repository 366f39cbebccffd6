"""The record of attention: the cost of a call under its mask, and the shapes that are measured and compiled."""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from .. import reference
from ..op import Arguments, Cost, Costs, Op, Sizes, draw, record
from .decode import attention_combine, attention_decode
from .fused import FUSED_KERNELS
from .launches import KERNELS
from .op import attention


def _sum_of_least(count: int, top: int) -> int:
    """Return min(1, top) + min(2, top) + ... + min(count, top)."""
    reach = max(0, min(count, top))
    return reach * (reach + 1) // 2 + max(0, count - top) * top


def attention_pairs(
    num_queries: int,
    num_keys: int,
    causal: bool = True,
    window: int | None = None,
    document_lengths: Sequence[int] | None = None,
) -> int:
    """Return the number of (query, key) pairs of one head under the mask, as in `attention`.

    Causal self-attention has T (T + 1) / 2 pairs. `document_lengths` are the lengths of packed documents; they sum to num_keys.
    """
    lengths = (num_keys,) if document_lengths is None else document_lengths
    if sum(lengths) != num_keys:
        raise ValueError(f"document_lengths sum to {sum(lengths)}: expected {num_keys}, the number of keys")
    # A query at position p sees the keys p - back to p + ahead of its document.
    back = num_keys if window is None else window - 1
    ahead = 0 if causal else num_queries if window is None else window - 1
    pairs, begin = 0, 0
    for length in lengths:
        first = num_keys - num_queries if document_lengths is None else max(begin, num_keys - num_queries)
        queries = max(0, begin + length - first)
        # The keys up to p + ahead, minus the keys before p - back. Each is a sum over p of a count between 0 and the length.
        for reach, sign in ((ahead, 1), (-back - 1, -1)):
            before = first - begin + reach
            pairs += sign * (_sum_of_least(before + queries, length) - _sum_of_least(before, length))
        begin += length
    return pairs


def _costs(
    itemsize: int,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    causal: bool = True,
    window: int | None = None,
    document_lengths: Sequence[int] | None = None,
    pairs: int | None = None,
    value_dim: int | None = None,
    cache_lengths: Sequence[int] | None = None,
) -> Costs:
    """Return the costs under the mask, or for an explicit number of `pairs` of query and key per head.

    Forward: two products; read q, k and v, write o and lse. Backward: five products, the recomputed scores, dV, dP, dQ and dK
    (Dao 2023, algorithm 2); read q, k, v, o, do and lse, write dq, dk and dv. The two products that the two kernels compute
    twice count once. A decoding step has no backward pass.
    """
    if pairs is None:
        pairs = attention_pairs(num_queries, num_keys, causal, window, document_lengths)
    # q k^T, dQ and dK have the width of q and k; p v, dV and dP have the width of v.
    width = value_dim or head_dim
    product, both = 2 * pairs * num_heads * batch, head_dim + width
    queries = batch * num_heads * num_queries * both * itemsize
    keys = batch * num_kv_heads * num_keys * both * itemsize
    lse = 4 * batch * num_heads * num_queries
    forward = Cost(queries + keys + lse, product * both)
    return Costs.of(forward, Cost(2 * queries + 2 * keys + lse, product * (3 * head_dim + 2 * width)))


def _arguments(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    document_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    cache_lengths: Sequence[int] | None = None,
    value_dim: int | None = None,
    sinks: bool = False,
    expanded: bool = False,
    **options: Any,
) -> Arguments:
    """Return q, k, v in the layout of a projection's output. `expanded` keys are shared by all sequences and unfit for TMA."""
    q = draw(device, dtype, batch, num_queries, num_heads, head_dim, heads_first=True)
    keys = (1 if expanded else batch, num_keys, num_kv_heads)
    k, v = (draw(device, dtype, *keys, width, heads_first=True) for width in (head_dim, value_dim or head_dim))
    if expanded:
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
    if num_queries < num_keys:
        # A decoding step needs no gradients.
        q, k, v = (t.detach() for t in (q, k, v))
    for name, lengths in (("cu_seqlens", document_lengths), ("cu_seqlens_k", key_lengths)):
        if lengths is not None:
            options[name] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    if cache_lengths is not None:
        options["cache_lengths"] = torch.tensor(cache_lengths[:batch], dtype=torch.int32, device=device)
    if sinks:
        options["sinks"] = draw(device, torch.float32, num_heads).requires_grad_(q.requires_grad)
    return Arguments((q, k, v), options)


def draw_lengths(num_tokens: int, median: float = 700.0, sigma: float = 1.2, seed: int = 0) -> tuple[int, ...]:
    """Return document lengths that sum to `num_tokens`, drawn from a lognormal distribution like that of web pages."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(min(1 + int(generator.lognormvariate(math.log(median), sigma)), num_tokens - sum(lengths)))
    return tuple(lengths)


def _causal(head_dim: int, num_tokens: int, groups: int = 1, **others: Any) -> dict[str, Any]:
    # B T is at least 16,384 and H K is 2,048.
    heads = 2048 // head_dim
    sizes = {"batch": max(1, 16_384 // num_tokens), "num_heads": heads, "num_kv_heads": heads // groups}
    return {**sizes, "num_queries": num_tokens, "num_keys": num_tokens, "head_dim": head_dim, **others}


def _decoding(batch: int, num_keys: int, head_dim: int = 128, **options: Any) -> dict[str, Any]:
    sizes = {"batch": batch, "num_heads": 32, "num_kv_heads": 4, "num_queries": 1, "num_keys": num_keys}
    return {**sizes, "head_dim": head_dim, **options}


_SMALL = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "num_queries": 24, "num_keys": 24, "head_dim": 16}
_OPTIONS = {"window": 5, "softcap": 20.0, "document_lengths": (9, 15), "sinks": True, "return_lse": True}
_OTHERS = {"batch": 2, "causal": False, "window": (6, 3), "cache_lengths": (24, 17), "value_dim": 24}
_PACKED = {"batch": 2, "num_queries": 30, "window": 8, "document_lengths": (12, 18), "key_lengths": (16, 8), "allow_tf32": True}


def _measured() -> Iterator[dict[str, Any]]:
    # The shape of the CS336 leaderboard comes first.
    yield {"batch": 1, "num_heads": 16, "num_kv_heads": 16, "num_queries": 16_384, "num_keys": 16_384, "head_dim": 64}
    yield from (_causal(128, tokens) for tokens in (16_384, 8192, 4096, 2048, 1024, 512))
    yield _causal(128, 16_384, window=1024)
    yield _causal(128, 16_384, document_lengths=draw_lengths(16_384))
    yield _causal(128, 16_384, groups=8)
    for batch in (1, 32):
        yield from (_decoding(batch, keys) for keys in (1024, 8192, 65_536))
    yield from (_causal(head_dim, tokens) for tokens in (16_384, 4096, 512) for head_dim in (64, 256))
    yield _causal(128, 32_768)
    yield _causal(128, 65_536, window=1024)
    yield _causal(128, 65_536)


def _compiled() -> Iterator[dict[str, Any]]:
    kinds: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
        ((16, 32, 64, 80, 96, 128, 192, 256), {"dtype": torch.bfloat16}),
        ((128, 256), {"dtype": torch.bfloat16, "softcap": 50.0}),
        ((64, 128), {"dtype": torch.float32, "allow_tf32": True}),
        ((64, 128), {"dtype": torch.float32}),
    )
    for head_dims, kind in kinds:
        for head_dim in head_dims:
            yield _causal(head_dim, 2048) | kind
            # One query a head is the common step; 8 queries fill the widest program.
            yield _decoding(8, 8192, head_dim) | kind
            yield _decoding(8, 8192, head_dim, num_queries=8) | kind
    every_option: dict[str, Any] = {"causal": False, "window": 512, "document_lengths": (1000, 1048), "sinks": True}
    yield _causal(128, 2048, groups=2, dtype=torch.bfloat16)
    # Multi-head latent attention (DeepSeek-AI 2024), trained and decoded.
    yield _causal(192, 2048, value_dim=128, dtype=torch.bfloat16)
    yield _decoding(8, 8192, 192, value_dim=128, dtype=torch.bfloat16)
    for head_dim in (64, 128):
        yield _causal(head_dim, 2048, groups=2, dtype=torch.bfloat16, **every_option)
        yield _decoding(8, 2048, head_dim, dtype=torch.bfloat16, cache_lengths=(2048,) * 8, **every_option)
        yield _causal(head_dim, 2048, dtype=torch.bfloat16, expanded=True)
    sides: dict[str, Any] = {"causal": False, "window": (512, 64), "dtype": torch.bfloat16}
    yield _causal(128, 2048, **sides)
    yield _causal(128, 2048, document_lengths=(1000, 1048), key_lengths=(48, 2000), **sides)


def _series(sizes: Sizes) -> str | None:
    """Plain causal self-attention without grouped heads forms one series per head dim, over the sequence length."""
    special = sizes.keys() & {"window", "document_lengths"} or sizes["num_heads"] != sizes["num_kv_heads"]
    return None if special or sizes["num_queries"] != sizes["num_keys"] else f"attention K{sizes['head_dim']}"


record(
    Op(
        function=attention,
        reference=reference.attention,
        kernels=(
            *(kernel for forms in KERNELS.values() for kernel in forms[:2]),
            *FUSED_KERNELS,
            attention_decode,
            attention_combine,
        ),
        arguments=_arguments,
        cost=_costs,
        shapes=tuple(_measured()),
        examples=(_SMALL, _SMALL | _OPTIONS, _SMALL | _OTHERS, _SMALL | _PACKED),
        compiled=tuple(_compiled()),
        over="num_queries",
        series=_series,
        group="attention",
        bound_by="flops",
        huge=_causal(128, 2**16, batch=9, num_heads=32, num_kv_heads=32, window=64),
    )
)
