"""What of the kernel library is measured: each op at the shapes of real models, beside its peers."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels import costs, reference
from ..kernels.costs import Cost

Variant = Callable[..., Any]
# So many that the GPU, not the launch of its kernels, takes the time.
TOKENS = 2**16


@dataclass(frozen=True)
class OpCase:
    """One op at one shape: `make(device)` gives its inputs, `variants` its forms, "torch" among them as the yardstick."""

    name: str
    make: Callable[[torch.device], tuple[Tensor, ...]]
    variants: Mapping[str, Variant]
    forward: Cost | None
    """None where the forward pass already computes the gradients, so that only both together compare."""
    backward: Cost | None
    both: Cost
    fused: tuple[str, ...] = ()
    """Variants whose forward pass writes the gradient into its input, which are timed both ways together only."""


def _peer(module: str, name: str) -> Variant | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def _liger(name: str) -> Variant | None:
    return _peer("liger_kernel.transformers.functional", f"liger_{name}")


def _variants(own: Variant, torch_form: Variant, **peers: Variant | None) -> dict[str, Variant]:
    """The op, PyTorch's form eager and compiled, and those of the optional peers that are installed."""
    # All cases share this lambda's code, by which torch.compile keeps its results: the bench resets it between cases.
    compiled = torch.compile(lambda *inputs: torch_form(*inputs), dynamic=False)
    present = {name: peer for name, peer in peers.items() if peer is not None}
    return {"tilewright": own, "torch": torch_form, "torch.compile": compiled, **present}


def _case(
    name: str,
    make: Callable[[torch.device], tuple[Tensor, ...]],
    variants: dict[str, Variant],
    cost: Cost | tuple[Cost, Cost],
    fused: tuple[str, ...] = (),
) -> OpCase:
    if isinstance(cost, Cost):
        return OpCase(name, make, variants, None, None, cost)
    forward, backward = cost
    return OpCase(name, make, variants, forward, backward, forward + backward, fused)


def _bf16(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).bfloat16()


def _rms_norm(width: int) -> OpCase:
    liger = _liger("rms_norm")
    return _case(
        f"rms_norm {TOKENS}x{width}",
        lambda device: (_bf16(device, TOKENS, width), _bf16(device, width)),
        _variants(
            kernels.rms_norm,
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
            liger=liger and (lambda x, w: liger(x, w, 1e-5, casting_mode="gemma", in_place=False)),
        ),
        costs.rms_norm(TOKENS, width, 2),
    )


def _add_rms_norm(width: int) -> OpCase:
    return _case(
        f"add_rms_norm {TOKENS}x{width}",
        lambda device: (_bf16(device, TOKENS, width), _bf16(device, TOKENS, width), _bf16(device, width)),
        _variants(kernels.add_rms_norm, reference.add_rms_norm),
        costs.add_rms_norm(TOKENS, width, 2),
    )


def _swiglu(width: int) -> OpCase:
    return _case(
        f"swiglu {TOKENS}x{width}",
        lambda device: (_bf16(device, TOKENS, width), _bf16(device, TOKENS, width)),
        _variants(kernels.swiglu, lambda gate, up: F.silu(gate) * up, liger=_liger("swiglu")),
        costs.swiglu(TOKENS, width, 2),
        # Its backward pass writes over its inputs, so that it cannot be repeated alone.
        fused=("liger",),
    )


def _rope(heads: int, kv_heads: int, head_dim: int, context: int = 4096) -> OpCase:
    batch = TOKENS // context

    def make(device: torch.device) -> tuple[Tensor, ...]:
        # As a projection leaves them: (B, T, H, K) in memory, (B, H, T, K) in shape.
        q, k = (_bf16(device, batch, context, h, head_dim).transpose(1, 2) for h in (heads, kv_heads))
        angles = torch.outer(
            torch.arange(context, device=device).float(), 1e4 ** -torch.arange(0, 1, 2 / head_dim, device=device)
        )
        return q, k, angles.cos(), angles.sin()

    return _case(
        f"rope_qk {TOKENS} tokens, {heads}+{kv_heads} heads of {head_dim}",
        make,
        _variants(kernels.rope_qk, reference.rope_qk),
        costs.rope(TOKENS, heads + kv_heads, head_dim, 2),
    )


def _cross_entropy(vocab_size: int, rows: int = 8192) -> OpCase:
    return _case(
        f"cross_entropy {rows}x{vocab_size}",
        lambda device: (_bf16(device, rows, vocab_size), torch.randint(vocab_size, (rows,), device=device)),
        _variants(kernels.cross_entropy, lambda x, t: F.cross_entropy(x.float(), t), liger=_liger("cross_entropy")),
        costs.cross_entropy(rows, vocab_size, 2),
        fused=("liger",),
    )


def _linear_cross_entropy(d_model: int, vocab_size: int, rows: int = 8192) -> OpCase:
    liger, cut = _liger("fused_linear_cross_entropy"), _peer("cut_cross_entropy", "linear_cross_entropy")
    return _case(
        f"linear_cross_entropy {rows}x{d_model}x{vocab_size}",
        lambda device: (
            _bf16(device, rows, d_model),
            _bf16(device, vocab_size, d_model, scale=d_model**-0.5),
            torch.randint(vocab_size, (rows,), device=device),
        ),
        {
            **_variants(
                kernels.linear_cross_entropy,
                lambda x, w, t: F.cross_entropy((x @ w.T).float(), t),
                liger=liger,
            ),
            # By its default it leaves out gradients that are small.
            **({} if cut is None else {"cut_cross_entropy, filtered": cut}),
            **({"torch linear_cross_entropy": F.linear_cross_entropy} if hasattr(F, "linear_cross_entropy") else {}),
        },
        costs.linear_cross_entropy(rows, d_model, vocab_size, 2),
    )


def op_cases() -> Iterator[OpCase]:
    """Yield what is measured: GPT-2 small to XL, Llama-3 8B (D 4096, F 14336, V 128,256), Gemma (V 262,144)."""
    yield from map(_rms_norm, (768, 1024, 1280, 1600, 2048, 4096, 8192, 16384, 32768))
    yield from map(_add_rms_norm, (1600, 4096, 8192))
    yield from map(_swiglu, (3072, 6400, 14336))
    yield _rope(12, 12, 64)
    yield _rope(32, 8, 128)
    yield from map(_cross_entropy, (32_000, 50_304, 128_256, 262_144))
    yield from (_linear_cross_entropy(*shape) for shape in ((768, 50_304), (4096, 128_256), (2304, 262_144)))
