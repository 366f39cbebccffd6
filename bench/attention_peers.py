"""Attention of other libraries, each as a function of q, k and v for one shape."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import attention, reference
from ..kernels.attention.choice import FORMS, AttentionKernel, use_attention_kernel
from ..kernels.attention.hopper_backward import attention_backward_hopper
from ..kernels.inspect import launches
from ..kernels.op import ALL, Sizes
from .peers import OWN, Unsupported, find

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, H, T, K), k, v (B, Hkv, S, K) -> o (B, H, T, K)."""
Peer = Callable[[Sizes, torch.device], Attention]
"""Prepares a function for one shape; it builds masks here, outside the timed call."""

# Math attention holds several copies of the scores; a mask takes one or two bytes per pair.
MAX_SCORE_BYTES = 4 * 2**30
MAX_MASKED_PAIRS = 2**28
MAX_EFFICIENT_TOKENS = 2**14
FLEX_SHAPE = (16, 16, 16_384)


def document_ids(sizes: Sizes, device: torch.device) -> Tensor | None:
    """Return the number of each token's document (S), int64, or None without documents."""
    lengths = sizes.get("document_lengths")
    if lengths is None:
        return None
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def _sdpa(backend: SDPBackend) -> Peer:
    def make(sizes: Sizes, device: torch.device) -> Attention:
        score_bytes = 4 * sizes["batch"] * sizes["num_heads"] * sizes["num_queries"] * sizes["num_keys"]
        if backend == SDPBackend.MATH and score_bytes > MAX_SCORE_BYTES:
            raise Unsupported(f"its scores take {score_bytes / 1e9:.0f} GB, several times")
        if backend == SDPBackend.EFFICIENT_ATTENTION and sizes["num_queries"] > MAX_EFFICIENT_TOKENS:
            raise Unsupported("skipped at this length: too slow")
        mask = None
        if "window" in sizes or "document_lengths" in sizes:
            if backend == SDPBackend.FLASH_ATTENTION:
                raise Unsupported("does not support masks")
            if sizes["num_queries"] * sizes["num_keys"] > MAX_MASKED_PAIRS:
                raise Unsupported("its mask has T x S entries")
            ids = document_ids(sizes, device)
            mask = reference.attention_mask(
                sizes["num_queries"], sizes["num_keys"], True, sizes.get("window"), None if ids is None else ids[None], device
            ).view(sizes["num_queries"], sizes["num_keys"])
        # SDPA aligns its causal mask to the first key; a single query sees all keys.
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None and sizes["num_queries"] > 1}
        options["enable_gqa"] = sizes["num_kv_heads"] != sizes["num_heads"]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        return run

    return make


def _flex(sizes: Sizes, device: torch.device) -> Attention:
    if (sizes["num_heads"], sizes["num_kv_heads"], sizes["num_queries"]) != FLEX_SHAPE:
        raise Unsupported("skipped except at 16 heads and 16,384 tokens: each shape compiles for seconds")
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

    masks: list[Callable[..., Tensor]] = [lambda batch, head, query, key: query >= key]
    if "window" in sizes:
        window = sizes["window"]
        masks.append(lambda batch, head, query, key: query - key < window)
    document = document_ids(sizes, device)
    if document is not None:
        masks.append(lambda batch, head, query, key: document[query] == document[key])
    visible = masks[0] if len(masks) == 1 else and_masks(*masks)
    block_mask = create_block_mask(visible, None, None, sizes["num_queries"], sizes["num_keys"], device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)  # pyright: ignore[reportReturnType]


def _packed(function: Callable[..., Any], sizes: Sizes, device: torch.device, **options: Any) -> Attention:
    """Adapt a variable-length function: tokens (B T, H, K), then the cumulative and the largest sequence lengths."""
    lengths = sizes.get("document_lengths") or (sizes["num_queries"],)
    one = torch.tensor(lengths, device=device).repeat(sizes["batch"])
    borders = F.pad(one.cumsum(0), (1, 0)).to(torch.int32)
    borders_and_longest = (borders, borders, max(lengths), max(lengths))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), *borders_and_longest, **options)
        out = out[0] if isinstance(out, tuple) else out
        return out.unflatten(0, (sizes["batch"], sizes["num_queries"])).transpose(1, 2)

    return run


def _flash_attention(module: str) -> Peer:
    def make(sizes: Sizes, device: torch.device) -> Attention:
        library = find(module)
        options: dict[str, Any] = {"causal": True}
        if "window" in sizes:
            options["window_size"] = (sizes["window"] - 1, 0)
        if "document_lengths" in sizes:
            return _packed(library.flash_attn_varlen_func, sizes, device, **options)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = library.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return make


def _varlen(sizes: Sizes, device: torch.device) -> Attention:
    if "window" not in sizes and "document_lengths" not in sizes:
        raise Unsupported("the same as SDPA flash without a window or documents")
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if "window" not in sizes else sizes["window"] - 1
    return _packed(varlen_attn, sizes, device, window_size=(back, 0))


def variant_of(form: str) -> str:
    """Return the variant name of one of our attention kernels: `portable`, `gluon` or `fused`."""
    return f"{OWN}, {form}"


def _own(form: AttentionKernel) -> Peer:
    def make(sizes: Sizes, device: torch.device) -> Attention:
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
            raise Unsupported("only one kernel exists without a Hopper GPU")
        op = ALL["attention"]
        with use_attention_kernel("fused" if form == "fused" else "gluon"):
            kernels = [case.kernel for case in launches(op, {**sizes, "dtype": torch.bfloat16}, "sm_90")]
        if not any(kernel.is_gluon() for kernel in kernels):
            raise Unsupported("no Gluon kernel for this shape")
        if form == "fused" and attention_backward_hopper not in kernels:
            raise Unsupported("no fused backward kernel for this shape")
        # Keep the keyword arguments that are not tensors; `cu_seqlens` replaces the document tensors.
        drawn = op.arguments(torch.device("meta"), torch.bfloat16, **sizes).options
        options = {name: x for name, x in drawn.items() if not isinstance(x, Tensor)}
        if "document_lengths" in sizes:
            options["cu_seqlens"] = torch.tensor([0, *accumulate(sizes["document_lengths"])], dtype=torch.int32, device=device)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with use_attention_kernel(form):
                return attention(q, k, v, **options)

        return run

    return make


ATTENTION_PEERS: Mapping[str, Peer] = {
    # All of our kernels; the default choice is a variant of its own.
    **{variant_of(form): _own(form) for form in FORMS},
    "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": _sdpa(SDPBackend.MATH),
    "torch varlen": _varlen,
    "flex_attention": _flex,
    "flash-attn 2": _flash_attention("flash_attn"),
    "flash-attn 3": _flash_attention("flash_attn_interface"),
}
