"""One record per op: the data that benches, cost accounting, profiles, the compile gate and the contract tests read.

The file of an op ends with its record. `ALL` holds the records of all ops that `tilewright.kernels` imports.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Sizes = Mapping[str, Any]
"""Sizes of a call by name, such as {"rows": 8192, "width": 4096}, and options of the function."""

# Usual symbols for sizes.
SYMBOLS = {
    "batch": "B", "num_queries": "T", "num_keys": "S", "num_tokens": "T", "num_heads": "H", "num_kv_heads": "Hkv",
    "head_dim": "K", "d_model": "D", "vocab_size": "V",
}  # fmt: skip
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Cost:
    """Least bytes moved and FLOPs computed by one call.

    Bytes count each input read once and each output written once. FLOPs count an exponential or a root as one. For
    memory-bound ops the FLOPs only show that memory is the bound.
    """

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the roofline time: the greater of the memory time and the compute time (Williams et al. 2009)."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


class Costs(NamedTuple):
    """Costs of the passes of an op; None for a pass that cannot run alone."""

    forward: Cost | None
    backward: Cost | None
    both: Cost

    @classmethod
    def of(cls, forward: Cost, backward: Cost) -> "Costs":
        """Return the costs of an op whose backward pass runs separately."""
        return cls(forward, backward, forward + backward)


class Arguments(NamedTuple):
    """Arguments of one call, by position and by name; trained tensors require a gradient."""

    positional: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """The record of one op."""

    function: Callable[..., Any]
    """The public function; the op has its name."""
    reference: Callable[..., Any]
    """The same in plain PyTorch: specification, CPU path and oracle."""
    kernels: tuple[Any, ...]
    """The kernels that it launches. Their names begin with the name of an op, which identifies them in a trace."""
    arguments: Callable[..., Arguments]
    """`arguments(device, dtype, **sizes)` returns random arguments of a call."""
    cost: Callable[..., Costs]
    """`cost(itemsize, **sizes)` returns the costs of a call."""
    shapes: tuple[Sizes, ...]
    """Calls that benches measure, the most important first."""
    examples: tuple[Sizes, ...]
    """Calls that a CPU computes in milliseconds, covering all kinds of options; the plain call first."""
    compiled: tuple[Sizes, ...]
    """Calls whose launches must compile without a spill; each has its `dtype`."""
    baseline: Callable[..., Any] | None = None
    """PyTorch's own implementation, where it differs from the reference."""
    over: str = ""
    """The size on the x axis of a plot or in the rows of a table."""
    series: Callable[[Sizes], str | None] | None = None
    """Return the series of a shape, or None for a shape of no series. The shapes of a series differ only in `over`. By
    default all shapes form one series with the name of the op."""
    group: Literal["own", "attention"] = "own"
    """Group of its kernels in a profile."""
    bound_by: Literal["bytes", "flops"] = "bytes"
    """Bound of the roofline at the measured shapes."""
    products: Literal["bf16", "fp8"] = "bf16"
    """Dtype of its matrix products in a bench, which bounds their speed."""
    capability: int = 80
    """Minimum compute capability of its kernels."""
    huge: Sizes = field(default_factory=dict)
    """A bfloat16 call with offsets beyond 2^31 that fits in 80 GB; empty if there is none."""

    @property
    def name(self) -> str:
        """The name of the public function."""
        return self.function.__name__

    def label(self, sizes: Sizes) -> str:
        """Return the label of a call, such as `attention B1 H16 Hkv16 T8192 S8192 K64`."""
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
    """Add an op to `ALL`."""
    ALL[op.name] = op
    return op


def grid(**values: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values of each size."""
    for combination in product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def draw(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, heads_first: bool = False) -> Tensor:
    """Return normal values that require a gradient; `heads_first` transposes `shape` (B, T, H, K) to a (B, H, T, K) view."""
    x = torch.randn(shape, dtype=dtype, device=device) * scale
    return (x.transpose(1, 2) if heads_first else x).requires_grad_()
