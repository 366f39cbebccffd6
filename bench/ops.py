"""Benchmark cases of the kernel library: each op at its recorded shapes, with its reference, PyTorch and peers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.op import ALL, Arguments, Cost, Op, Sizes
from .attention_oracle import expected_attention
from .check import Checker, expected_results
from .op_peers import BOTH_ONLY, PEERS
from .peers import OWN

Variant = Callable[..., Any]
# Expected results of ops whose float64 reference would not fit in memory.
ORACLES: Mapping[str, Callable[..., Mapping[str, Checker]]] = {"attention": expected_attention}


@dataclass(frozen=True)
class Case:
    """One op at one shape, in bfloat16."""

    op: Op
    sizes: Sizes

    @property
    def name(self) -> str:
        """Label of the op and its sizes."""
        return self.op.label(self.sizes)

    @property
    def size(self) -> int:
        """Size of the plotted dimension: a width, or a vocabulary."""
        return self.sizes[self.op.over]

    def arguments(self, device: torch.device) -> Arguments:
        """Draw the arguments of a call, the same each time."""
        torch.manual_seed(0)
        return self.op.arguments(device, torch.bfloat16, **self.sizes)

    def costs(self) -> dict[str, Cost]:
        """Return the cost of each direction; without trained inputs, of the forward pass only."""
        drawn = self.op.arguments(torch.device("meta"), torch.bfloat16, **self.sizes)
        trains = any(isinstance(x, Tensor) and x.requires_grad for x in drawn.positional)
        costs = self.op.cost(torch.bfloat16.itemsize, **self.sizes)._asdict()
        return {way: cost for way, cost in costs.items() if cost is not None and (trains or way == "forward")}

    def forms(self, options: Mapping[str, Any], device: torch.device) -> dict[str, Callable[[], Variant]]:
        """Return the variants, each built when called: ours, PyTorch's eager and compiled forms, and peers.

        A variant takes the positional arguments; `options` are the keyword arguments. A variant raises `Unsupported` if its
        package is missing or it lacks the shape.
        """
        baseline = partial(self.op.baseline or self.op.reference, **options)
        forms: dict[str, Callable[[], Variant]] = {OWN: lambda: partial(self.op.function, **options)}
        if self.op.name not in ORACLES:
            forms["torch"] = lambda: baseline
            # torch.compile caches by this lambda's code, which all cases share, so the bench resets it between cases.
            forms["torch.compile"] = lambda: torch.compile(lambda *args: baseline(*args), dynamic=False)
        return forms | {name: partial(peer, self.sizes, device) for name, peer in PEERS.get(self.op.name, {}).items()}

    def is_timed(self, name: str, direction: str) -> bool:
        """Return whether to time a direction; some variants compute gradients in their forward pass."""
        return direction == "both" or (self.op.name, name) not in BOTH_ONLY

    def expected(self, arguments: Arguments) -> Mapping[str, Checker]:
        """Return the expected results and gradients of a call."""
        if self.op.name in ORACLES:
            return ORACLES[self.op.name](arguments)
        baseline = partial(self.op.baseline or self.op.reference, **arguments.options)
        return expected_results(partial(self.op.reference, **arguments.options), baseline, arguments.positional)


def cases(group: str) -> Iterator[Case]:
    """Yield the shapes of the ops of a group, the first shape of every op first, so that a short bench covers all ops."""
    ops = [op for op in ALL.values() if op.group == group]
    yield from (Case(op, op.shapes[0]) for op in ops)
    yield from (Case(op, sizes) for op in ops for sizes in op.shapes[1:])


def small_cases(group: str) -> Iterator[Case]:
    """Yield each op at a size that a CPU computes in milliseconds, to test the bench."""
    yield from (Case(op, op.examples[0]) for op in ALL.values() if op.group == group)
