"""What of the kernel library is measured: each op at the shapes of its record, beside its reference, PyTorch and peers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.op import ALL, Arguments, Cost, Op, Sizes
from .attention_oracle import attention_right
from .check import Judge, what_is_right
from .op_peers import BOTH_ONLY, PEERS
from .peers import OWN

Variant = Callable[..., Any]
# Results that are known in another way than by the reference in float64, which would hold all scores at once.
ORACLES: Mapping[str, Callable[..., Mapping[str, Judge]]] = {"attention": attention_right}


@dataclass(frozen=True)
class Case:
    """One op at one shape, in bfloat16."""

    op: Op
    sizes: Sizes

    @property
    def name(self) -> str:
        """The op and its sizes."""
        return self.op.label(self.sizes)

    @property
    def size(self) -> int:
        """What the op is measured over: its width, or its vocabulary."""
        return self.sizes[self.op.over]

    def arguments(self, device: torch.device) -> Arguments:
        """Draw the arguments of a call, the same each time."""
        torch.manual_seed(0)
        return self.op.arguments(device, torch.bfloat16, **self.sizes)

    def costs(self) -> dict[str, Cost]:
        """Return what each direction costs; where nothing is trained there is only the forward pass."""
        drawn = self.op.arguments(torch.device("meta"), torch.bfloat16, **self.sizes)
        trains = any(isinstance(x, Tensor) and x.requires_grad for x in drawn.positional)
        costs = self.op.cost(torch.bfloat16.itemsize, **self.sizes)._asdict()
        return {way: cost for way, cost in costs.items() if cost is not None and (trains or way == "forward")}

    def forms(self, options: Mapping[str, Any], device: torch.device) -> dict[str, Callable[[], Variant]]:
        """Return what is measured, each made when it is called: ours, PyTorch's eager and compiled, and the peers'.

        A variant takes the positional arguments; `options` are the others. One that is not here, or has no such shape, raises
        `Unsupported`.
        """
        baseline = partial(self.op.baseline or self.op.reference, **options)
        forms: dict[str, Callable[[], Variant]] = {OWN: lambda: partial(self.op.function, **options)}
        if self.op.name not in ORACLES:
            forms["torch"] = lambda: baseline
            # All cases share this lambda's code, by which torch.compile keeps its results: the bench resets it between cases.
            forms["torch.compile"] = lambda: torch.compile(lambda *args: baseline(*args), dynamic=False)
        return forms | {name: partial(peer, self.sizes, device) for name, peer in PEERS.get(self.op.name, {}).items()}

    def is_timed(self, name: str, direction: str) -> bool:
        """Whether a direction of this variant compares: some compute gradients in their forward pass."""
        return direction == "both" or (self.op.name, name) not in BOTH_ONLY

    def right(self, arguments: Arguments) -> Mapping[str, Judge]:
        """Return what the results and the gradients of a call must be."""
        if self.op.name in ORACLES:
            return ORACLES[self.op.name](arguments)
        baseline = partial(self.op.baseline or self.op.reference, **arguments.options)
        return what_is_right(partial(self.op.reference, **arguments.options), baseline, arguments.positional)


def cases(group: str) -> Iterator[Case]:
    """Yield the shapes of the ops of a group: first one of each, so that a bench whose time ends has seen them all."""
    ops = [op for op in ALL.values() if op.group == group]
    yield from (Case(op, op.shapes[0]) for op in ops)
    yield from (Case(op, sizes) for op in ops for sizes in op.shapes[1:])


def small_cases(group: str) -> Iterator[Case]:
    """Yield each op at a size that a CPU computes in milliseconds: for the harness, not for a judgement."""
    yield from (Case(op, op.examples[0]) for op in ALL.values() if op.group == group)
