"""Implementations of our ops in other libraries, by op; an op without an entry is compared with PyTorch only."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.op import Sizes
from .attention_peers import ATTENTION_PEERS
from .peers import Unsupported, find

Peer = Callable[[Sizes, torch.device], Callable[..., Any]]
"""Prepares a function for one shape; raises `Unsupported` if the shape or the package is missing."""


def _liger(name: str, **options: Any) -> Peer:
    def make(sizes: Sizes, device: torch.device) -> Callable[..., Any]:
        function = find("liger_kernel.transformers.functional", f"liger_{name}")
        return lambda *args: function(*args, **options)

    return make


def _quack(name: str, **options: Any) -> Peer:
    def make(sizes: Sizes, device: torch.device) -> Callable[..., Any]:
        function = find("quack", name)
        return lambda *args: function(*args, **options)

    return make


def _liger_rms_norm(sizes: Sizes, device: torch.device) -> Callable[..., Any]:
    liger = find("liger_kernel.transformers.functional", "liger_rms_norm")
    return lambda x, weight: liger(x, weight, 1e-5, casting_mode="gemma", in_place=False)


def _quack_add_rms_norm(sizes: Sizes, device: torch.device) -> Callable[..., Any]:
    quack = find("quack", "rmsnorm")
    return lambda x, residual, weight: quack(x, weight, residual=residual, eps=1e-5, prenorm=True)


def _cut_cross_entropy(sizes: Sizes, device: torch.device) -> Callable[..., Any]:
    cut = find("cut_cross_entropy", "linear_cross_entropy")
    # By default it drops small gradients, which for random logits are all except the targets'.
    return lambda x, weight, targets: cut(x, weight, targets, filter_eps=None)


def _torch_linear_cross_entropy(sizes: Sizes, device: torch.device) -> Callable[..., Any]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"PyTorch {torch.__version__} lacks it")
    return F.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "rms_norm": {"liger": _liger_rms_norm, "quack": _quack("rmsnorm", eps=1e-5)},
    "add_rms_norm": {"quack": _quack_add_rms_norm},
    "layer_norm": {"liger": _liger("layer_norm", eps=1e-5)},
    "swiglu": {"liger": _liger("swiglu")},
    "geglu": {"liger": _liger("geglu")},
    "cross_entropy": {"liger": _liger("cross_entropy"), "quack": _quack("cross_entropy")},
    "linear_cross_entropy": {
        # The default accumulates the gradient of the weights in bfloat16.
        "liger": _liger("fused_linear_cross_entropy", accum_dtype=torch.float32),
        "cut_cross_entropy": _cut_cross_entropy,
        "torch linear_cross_entropy": _torch_linear_cross_entropy,
    },
    "attention": ATTENTION_PEERS,
}
# The forward pass of these writes gradients into its inputs, so it is timed only together with the backward pass.
BOTH_ONLY = {("swiglu", "liger"), ("geglu", "liger"), ("cross_entropy", "liger")}
