"""What of the kernel library is measured: each op at the shapes of real models, beside its peers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels import costs, reference
from ..kernels.costs import Cost
from .peers import Missing, adapt, find

Variant = Callable[..., Any]
# So many that the GPU, not the launch of its kernels, takes the time.
TOKENS = 2**16


@dataclass(frozen=True)
class OpCase:
    """One op at one shape: `make(device)` gives its inputs, `variants` its forms, "torch" among them as the yardstick."""

    name: str
    make: Callable[[torch.device], tuple[Tensor, ...]]
    variants: Mapping[str, Variant]
    oracle: Variant
    """What it computes, in the dtype of its inputs where that is float64."""
    forward: Cost | None
    """None where the forward pass already computes the gradients, so that only both together compare."""
    backward: Cost | None
    both: Cost
    fused: tuple[str, ...] = ()
    """Variants whose forward pass writes the gradient into its input, which are timed both ways together only."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Peers that have the op and are not here, and why."""
    size: int = 0
    """What the op is measured over: its width, or its vocabulary."""

    @property
    def op(self) -> str:
        """The op's name."""
        return self.name.split()[0]


def _liger(name: str) -> Any:
    return find("liger_kernel.transformers.functional", f"liger_{name}")


def _variants(own: Variant, torch_form: Variant, **peers: Any) -> dict[str, Any]:
    """The op, PyTorch's form eager and compiled, and those of the optional peers, installed or `Missing`."""
    # All cases share this lambda's code, by which torch.compile keeps its results: the bench resets it between cases.
    compiled = torch.compile(lambda *inputs: torch_form(*inputs), dynamic=False)
    return {"tilewright": own, "torch": torch_form, "torch.compile": compiled, **peers}


def _case(
    name: str,
    size: int,
    make: Callable[[torch.device], tuple[Tensor, ...]],
    variants: dict[str, Any],
    oracle: Variant,
    cost: Cost | tuple[Cost, Cost],
    fused: tuple[str, ...] = (),
) -> OpCase:
    missing = {name: peer.reason for name, peer in variants.items() if isinstance(peer, Missing)}
    present = {name: peer for name, peer in variants.items() if name not in missing}
    forward, backward = (None, None) if isinstance(cost, Cost) else cost
    both = cost if isinstance(cost, Cost) else cost[0] + cost[1]
    return OpCase(name, make, present, oracle, forward, backward, both, fused, missing, size)


def _bf16(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).bfloat16()


def _rms_norm(width: int, tokens: int = TOKENS) -> OpCase:
    return _case(
        f"rms_norm {tokens}x{width}",
        width,
        lambda device: (_bf16(device, tokens, width), _bf16(device, width)),
        _variants(
            kernels.rms_norm,
            lambda x, w: F.rms_norm(x, w.shape, w, 1e-5),
            liger=adapt(_liger("rms_norm"), lambda liger: lambda x, w: liger(x, w, 1e-5, casting_mode="gemma", in_place=False)),
            quack=adapt(find("quack", "rmsnorm"), lambda quack: lambda x, w: quack(x, w, eps=1e-5)),
        ),
        reference.rms_norm,
        costs.rms_norm(tokens, width, 2),
    )


def _add_rms_norm(width: int, tokens: int = TOKENS) -> OpCase:
    return _case(
        f"add_rms_norm {tokens}x{width}",
        width,
        lambda device: (_bf16(device, tokens, width), _bf16(device, tokens, width), _bf16(device, width)),
        _variants(
            kernels.add_rms_norm,
            reference.add_rms_norm,
            quack=adapt(
                find("quack", "rmsnorm"),
                lambda quack: lambda x, residual, w: quack(x, w, residual=residual, eps=1e-5, prenorm=True),
            ),
        ),
        reference.add_rms_norm,
        costs.add_rms_norm(tokens, width, 2),
    )


def _swiglu(width: int, tokens: int = TOKENS) -> OpCase:
    return _case(
        f"swiglu {tokens}x{width}",
        width,
        lambda device: (_bf16(device, tokens, width), _bf16(device, tokens, width)),
        _variants(kernels.swiglu, lambda gate, up: F.silu(gate) * up, liger=_liger("swiglu")),
        reference.swiglu,
        costs.swiglu(tokens, width, 2),
        # Its backward pass writes over its inputs, so that it cannot be repeated alone.
        fused=("liger",),
    )


def _rope(heads: int, kv_heads: int, head_dim: int, context: int = 4096, tokens: int = TOKENS) -> OpCase:
    batch = tokens // context

    def make(device: torch.device) -> tuple[Tensor, ...]:
        # As a projection leaves them: (B, T, H, K) in memory, (B, H, T, K) in shape.
        q, k = (_bf16(device, batch, context, h, head_dim).transpose(1, 2) for h in (heads, kv_heads))
        angles = torch.outer(
            torch.arange(context, device=device).float(), 1e4 ** -torch.arange(0, 1, 2 / head_dim, device=device)
        )
        return q, k, angles.cos(), angles.sin()

    return _case(
        f"rope_qk {tokens} tokens, {heads}+{kv_heads} heads of {head_dim}",
        (heads + kv_heads) * head_dim,
        make,
        _variants(kernels.rope_qk, reference.rope_qk),
        reference.rope_qk,
        costs.rope(tokens, heads + kv_heads, head_dim, 2),
    )


def _cross_entropy(vocab_size: int, rows: int = 8192) -> OpCase:
    return _case(
        f"cross_entropy {rows}x{vocab_size}",
        vocab_size,
        lambda device: (_bf16(device, rows, vocab_size), torch.randint(vocab_size, (rows,), device=device)),
        _variants(
            kernels.cross_entropy,
            lambda x, t: F.cross_entropy(x.float(), t),
            liger=_liger("cross_entropy"),
            quack=find("quack", "cross_entropy"),
        ),
        reference.cross_entropy,
        costs.cross_entropy(rows, vocab_size, 2),
        fused=("liger",),
    )


def _linear_cross_entropy(d_model: int, vocab_size: int, rows: int = 8192) -> OpCase:
    return _case(
        f"linear_cross_entropy {rows}x{d_model}x{vocab_size}",
        vocab_size,
        lambda device: (
            _bf16(device, rows, d_model),
            _bf16(device, vocab_size, d_model, scale=d_model**-0.5),
            torch.randint(vocab_size, (rows,), device=device),
        ),
        {
            **_variants(
                kernels.linear_cross_entropy,
                lambda x, w, t: F.cross_entropy((x @ w.T).float(), t),
                # By default it adds up the gradient of the weights in bfloat16.
                liger=adapt(
                    _liger("fused_linear_cross_entropy"),
                    lambda liger: lambda x, w, t: liger(x, w, t, accum_dtype=torch.float32),
                ),
            ),
            # By default it leaves out gradients that are small: of random logits, all but the targets'.
            "cut_cross_entropy": adapt(
                find("cut_cross_entropy", "linear_cross_entropy"),
                lambda cut: lambda x, w, t: cut(x, w, t, filter_eps=None),
            ),
            **({"torch linear_cross_entropy": F.linear_cross_entropy} if hasattr(F, "linear_cross_entropy") else {}),
        },
        reference.linear_cross_entropy,
        costs.linear_cross_entropy(rows, d_model, vocab_size, 2),
    )


def op_cases() -> Iterator[OpCase]:
    """Yield what is measured: GPT-2 small to XL, Llama-3 8B (D 4096, F 14336, V 128,256), Gemma (V 262,144).

    First one shape of each op, so that a bench whose time ends has seen them all.
    """
    yield _rms_norm(4096)
    yield _add_rms_norm(4096)
    yield _swiglu(14336)
    yield _rope(32, 8, 128)
    yield _cross_entropy(128_256)
    yield _linear_cross_entropy(4096, 128_256)
    yield from map(_rms_norm, (768, 1024, 1280, 1600, 2048, 8192))
    # Fewer tokens: in float64 all of them would take more memory than there is.
    yield from (_rms_norm(width, TOKENS * 8192 // width) for width in (16384, 32768))
    yield from map(_add_rms_norm, (1600, 8192))
    yield from map(_swiglu, (3072, 6400))
    yield _rope(12, 12, 64)
    yield from map(_cross_entropy, (32_000, 50_304, 262_144))
    yield from (_linear_cross_entropy(*shape) for shape in ((768, 50_304), (2304, 262_144)))


def small_cases() -> Iterator[OpCase]:
    """Yield each op at a size that a CPU computes in milliseconds: for the harness, not for a judgement."""
    yield _rms_norm(256, 64)
    yield _add_rms_norm(256, 64)
    yield _swiglu(256, 64)
    yield _rope(4, 2, 32, 64, 64)
    yield _cross_entropy(1000, 64)
    yield _linear_cross_entropy(64, 1000, 64)
