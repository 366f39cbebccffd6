"""Kernels against the copy bandwidth of the GPU and against PyTorch's and Liger's forms of the same op."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference, rms_norm
from .timing import time_variants

TOKENS = 2**14
# d_model of GPT-2 small to XL, Llama-3 8B and beyond.
WIDTHS = (768, 1024, 1600, 2048, 4096, 8192, 16384, 32768)
EPS = 1e-5

Op = Callable[[Tensor, Tensor], Tensor]


def _variants() -> dict[str, Op]:
    variants: dict[str, Op] = {
        "tilewright": lambda x, w: rms_norm(x, w, EPS),
        "torch": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        "torch.compile": torch.compile(lambda x, w: reference.rms_norm(x, w, EPS), dynamic=False),
    }
    try:
        liger = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        variants["liger"] = lambda x, w: liger.apply(x, w, EPS, 0.0, "none", False)
    except ImportError:
        pass  # an optional peer: its rows are simply not there
    return variants


def _agrees(op: Op, x: Tensor, weight: Tensor) -> bool:
    """Whether the error against float64 is at most twice the reference's, plus one rounding."""
    exact = reference.rms_norm(x.double(), weight.double(), EPS)
    allowed = 2 * (reference.rms_norm(x, weight, EPS) - exact).abs().max() + torch.finfo(x.dtype).eps
    return bool((op(x, weight) - exact).abs().max() <= allowed)


def bench_rms_norm(
    device: torch.device, copy_bytes_per_second: float, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any]]:
    """Yield the times of rms_norm, forward and backward, with the share of the copy bandwidth that the least traffic needs.

    Forward reads x and writes y; backward reads x and dy and writes dx; weights and statistics are below 0.1%.
    """
    for width in WIDTHS:
        yield from _bench_width(width, device, copy_bytes_per_second, dtype)


def _bench_width(
    width: int, device: torch.device, copy_bytes_per_second: float, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    x = torch.randn(TOKENS, width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(width, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    variants = {name: op for name, op in _variants().items() if _agrees(op, x.detach(), weight.detach())}
    outputs = {name: op(x, weight) for name, op in variants.items()}
    passes = {
        "forward": (2, {name: lambda op=op: op(x.detach(), weight.detach()) for name, op in variants.items()}),
        "backward": (
            3,
            {name: lambda y=y: torch.autograd.grad(y, (x, weight), dy, retain_graph=True) for name, y in outputs.items()},
        ),
    }
    for direction, (transfers, calls) in passes.items():
        for name, times in time_variants(calls, device).items():
            speed = transfers * x.nbytes / (times.p50_ms * 1e-3)
            yield {
                "case": f"rms_norm {direction} {TOKENS}x{width} {str(dtype).removeprefix('torch.')}",
                "variant": name,
                **asdict(times),
                "gb_per_s": speed / 1e9,
                "share_of_copy": speed / copy_bytes_per_second,
            }
