"""One record per op: all that benches, costs, profiles, the compiler's gate and the contract of the tests know of it.

The file of an op ends with its record. `ALL` holds the records of the ops that `tilewright.kernels` imports.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Sizes = Mapping[str, Any]
"""Named sizes of a call, such as {"rows": 8192, "width": 4096}; those that are no sizes are options of the function."""

# What the field writes for a size.
SYMBOLS = {
    "batch": "B", "num_queries": "T", "num_keys": "S", "num_tokens": "T", "num_heads": "H", "num_kv_heads": "Hkv",
    "head_dim": "K", "d_model": "D", "vocab_size": "V",
}  # fmt: skip
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Cost:
    """Least bytes moved and FLOPs computed by one call.

    Bytes count each input read once and each output written once. FLOPs count what is computed, an exponential or a root as
    one; for the ops bound by memory they only show that they are.
    """

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the roofline's time: the longer of moving the bytes and computing the FLOPs (Williams et al. 2009)."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


class Costs(NamedTuple):
    """What the directions of an op cost; None for one that cannot be had alone."""

    forward: Cost | None
    backward: Cost | None
    both: Cost

    @classmethod
    def of(cls, forward: Cost, backward: Cost) -> "Costs":
        """Return the costs of an op whose backward pass is a pass of its own."""
        return cls(forward, backward, forward + backward)


class Arguments(NamedTuple):
    """One call: what is given by position, tensors above all, of which those that are trained want a gradient; and by name."""

    positional: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """What is to be known of one op."""

    function: Callable[..., Any]
    """The public function. Its name is the op's."""
    reference: Callable[..., Any]
    """The same in plain PyTorch: specification, CPU path and oracle."""
    kernels: tuple[Any, ...]
    """Those that it launches; their names begin with that of an op, and say in a trace whose they are."""
    arguments: Callable[..., Arguments]
    """`arguments(device, dtype, **sizes)` draws the arguments of a call."""
    cost: Callable[..., Costs]
    """`cost(itemsize, **sizes)`."""
    shapes: tuple[Sizes, ...]
    """What is measured, the most telling first."""
    examples: tuple[Sizes, ...]
    """What a CPU computes in milliseconds, with every kind of option; the plain form first."""
    compiled: tuple[Sizes, ...]
    """Calls whose launches must compile without a spill; each has its `dtype`."""
    baseline: Callable[..., Any] | None = None
    """PyTorch's own form, where it is another than the reference."""
    over: str = ""
    """The size over which a table or a plot shows the op."""
    series: Callable[[Sizes], str | None] | None = None
    """The name of those shapes that only differ in it, or None for a shape of no such series; without it the op's name."""
    group: Literal["own", "attention"] = "own"
    """Where a profile counts its kernels."""
    bound_by: Literal["bytes", "flops"] = "bytes"
    """What limits it at the shapes that are measured."""
    capability: int = 80
    """The least compute capability that its kernels compile for."""
    huge: Sizes = field(default_factory=dict)
    """A call with offsets beyond 2^31, in bfloat16, that fits a GPU of 80 GB; empty where none does."""

    @property
    def name(self) -> str:
        """The name of the public function."""
        return self.function.__name__

    def label(self, sizes: Sizes) -> str:
        """Return the name of a call, such as `attention B1 H16 Hkv16 T8192 S8192 K64`."""
        return " ".join([self.name, *(_shown(name, value) for name, value in sizes.items())])


def _shown(name: str, value: Any) -> str:
    if isinstance(value, torch.dtype):
        return DTYPES[value]
    if isinstance(value, tuple):
        return f"{len(value)} {name}"
    return f"{SYMBOLS[name]}{value}" if name in SYMBOLS else f"{name} {value}"


ALL: dict[str, Op] = {}
"""The record of every op by its name."""


def record(op: Op) -> Op:
    """Enter an op into `ALL`."""
    ALL[op.name] = op
    return op


def grid(**values: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values of each size."""
    for combination in product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def draw(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, heads_first: bool = False) -> Tensor:
    """Return normal values that want a gradient; with `heads_first`, (B, T, H, K) in memory is (B, H, T, K) in shape."""
    x = torch.randn(shape, dtype=dtype, device=device) * scale
    return (x.transpose(1, 2) if heads_first else x).requires_grad_()
