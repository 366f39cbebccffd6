"""Other people's attention, each as a function of q, k and v for one shape; what a peer cannot do it says by raising."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import kernels
from .attention_cases import AttentionCase
from .peers import Missing, find

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, H, T, K), k, v (B, Hkv, S, K) -> o (B, H, T, K)."""
Peer = Callable[[AttentionCase, torch.device], Attention]
"""Makes ready for one shape: masks are made here, not in the time of a call."""

# The written-out form holds several copies of the scores; a mask holds a byte or two a pair.
MAX_SCORE_BYTES = 4 * 2**30
MAX_MASKED_PAIRS = 2**28
MAX_EFFICIENT_TOKENS = 2**14
FLEX_SHAPE = (16, 16, 16_384)


class Unsupported(Exception):
    """A shape that a peer does not have, or that is left out; the message says why."""


def _tilewright(case: AttentionCase, device: torch.device) -> Attention:
    cu_seqlens = case.cu_seqlens(device)
    return lambda q, k, v: kernels.attention(q, k, v, window=case.window, cu_seqlens=cu_seqlens)


def _sdpa(backend: SDPBackend) -> Peer:
    def make(case: AttentionCase, device: torch.device) -> Attention:
        if backend == SDPBackend.MATH and case.score_bytes > MAX_SCORE_BYTES:
            raise Unsupported(f"its scores take {case.score_bytes / 1e9:.0f} GB, more than once")
        if backend == SDPBackend.EFFICIENT_ATTENTION and case.num_queries > MAX_EFFICIENT_TOKENS:
            raise Unsupported("slow at this length: left out for the time it takes")
        mask = None
        if case.window is not None or case.document_lengths is not None:
            if backend == SDPBackend.FLASH_ATTENTION:
                raise Unsupported("takes no mask")
            if case.num_queries * case.num_keys > MAX_MASKED_PAIRS:
                raise Unsupported("its mask has T x S entries")
            mask = case.mask(device)
        # Its causal mask is aligned to the first key; a single query sees all of them.
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None and case.num_queries > 1}
        options["enable_gqa"] = case.num_kv_heads != case.num_heads

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        return run

    return make


def _flex(case: AttentionCase, device: torch.device) -> Attention:
    if (case.num_heads, case.num_kv_heads, case.num_queries) != FLEX_SHAPE:
        raise Unsupported("compiles for seconds at each shape: left out but for 16 heads and 16,384 tokens")
    from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

    masks: list[Callable[..., Tensor]] = [lambda batch, head, query, key: query >= key]
    if case.window is not None:
        window = case.window
        masks.append(lambda batch, head, query, key: query - key < window)
    document = case.document_ids(device)
    if document is not None:
        masks.append(lambda batch, head, query, key: document[query] == document[key])
    visible = masks[0] if len(masks) == 1 else and_masks(*masks)
    block_mask = create_block_mask(visible, None, None, case.num_queries, case.num_keys, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)  # pyright: ignore[reportReturnType]


def _packed(function: Callable[..., Any], case: AttentionCase, device: torch.device, **options: Any) -> Attention:
    """Call a function of tokens (B T, H, K) with the cumulative and the largest lengths of its sequences."""
    lengths = case.document_lengths or (case.num_queries,)
    one = torch.tensor(lengths, device=device).repeat(case.batch)
    borders = F.pad(one.cumsum(0), (1, 0)).to(torch.int32)
    sizes = (borders, borders, max(lengths), max(lengths))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), *sizes, **options)
        out = out[0] if isinstance(out, tuple) else out
        return out.unflatten(0, (case.batch, case.num_queries)).transpose(1, 2)

    return run


def _flash_attention(module: str) -> Peer:
    def make(case: AttentionCase, device: torch.device) -> Attention:
        library = importlib.import_module(module)
        options: dict[str, Any] = {"causal": True}
        if case.window is not None:
            options["window_size"] = (case.window - 1, 0)
        if case.document_lengths is not None:
            return _packed(library.flash_attn_varlen_func, case, device, **options)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = library.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return make


def _varlen(case: AttentionCase, device: torch.device) -> Attention:
    if case.window is None and case.document_lengths is None:
        raise Unsupported("the same as SDPA flash without a window or documents")
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if case.window is None else case.window - 1
    return _packed(varlen_attn, case, device, window_size=(back, 0))


PEERS: Mapping[str, Peer] = {
    "tilewright": _tilewright,
    "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": _sdpa(SDPBackend.MATH),
    "torch varlen": _varlen,
    "flex_attention": _flex,
    "flash-attn 2": _flash_attention("flash_attn"),
    "flash-attn 3": _flash_attention("flash_attn_interface"),
}
MODULES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}
"""What has to be installed for a peer beyond PyTorch."""


def installed_peers() -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers that can be imported, and of the others the reason."""
    found = {name: find(module) for name, module in MODULES.items()}
    missing = {name: module.reason for name, module in found.items() if isinstance(module, Missing)}
    return {name: peer for name, peer in PEERS.items() if name not in missing}, missing
