"""Runs warp-specialised Gluon kernels in NumPy, from their own source, with the order of everything that is free chosen here.

A partition of warps is one thread, and one thread runs at a time: at each barrier, copy and product it gives way, and a seeded
choice says who goes on. What is asynchronous on the hardware is an event of its own. A TMA copy makes its target NaN at once
and fills it later; a product reads its operands in shared memory at some time between its issue and its wait. Of the orders
`early` lets events happen at once, `late` when nobody else can go on, `random` at any time. A buffer that is freed, read or
overwritten too early gives wrong numbers in one of them, and a wrong phase a `Deadlock`. A few programs run at a time. They
begin in order, and one gives way to another where it changes global memory, or waits for another to.

What it proves: barriers and their phases, buffers, the order of products, what is masked, every sum, and that nobody waits for
a program that begins later. bfloat16 is rounded to nearest even, sums of products are float32, and a generic write to shared
memory that a product or a TMA copy reads without `fence_async_shared` in between is an error. What it does not prove, and tests
on a GPU must: layouts (the compiler checks that they fit), the encoding of descriptors and their swizzling, memory ordering
within a partition, between its warps and between programs, that a GPU begins programs in order, registers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tilewright.kernels import launch as launching

from .grid import Grid
from .language import Descriptor
from .program import ORDERS, Deadlock
from .translate import Mutation, translate
from .values import DType, Pointer

__all__ = ["ORDERS", "DType", "Deadlock", "Mutation", "emulate", "emulating"]


def _memory(x: torch.Tensor) -> Pointer:
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return Pointer(whole, x.storage_offset())


def emulate(
    launch: launching.Launch,
    order: str,
    seed: int = 0,
    mutation: Mutation | None = None,
    replaced: Mapping[str, Any] = {},
    at_once: int = 3,
) -> None:
    """Run all programs of a launch on tensors of the CPU, in its place, so many at once.

    Functions with the names in `replaced` are those.
    """
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | dict(launch.constants)
    arguments = []
    for name in names:
        x = values[name]
        if isinstance(x, torch.Tensor):
            x = _memory(x.detach())
        elif hasattr(x, "block_shape"):
            x = Descriptor(x.base.detach(), x.block_shape)
        arguments.append(x)
    run = translate(launch.kernel, {}, mutation, replaced)
    Grid(order, seed, launch.num_programs, at_once).run(lambda: run(*arguments))


class _Emulated(list[launching.Launch]):
    def __init__(self, *how: Any) -> None:
        super().__init__()
        self.how = how

    def append(self, launch: launching.Launch) -> None:
        super().append(launch)
        if getattr(launch.kernel, "is_gluon", lambda: False)():
            emulate(launch, *self.how)
        else:
            launch.kernel.run(*launch.args, grid=(launch.num_programs,), warmup=False, **launch.constants)


@contextmanager
def emulating(
    order: str = "random",
    seed: int = 0,
    mutation: Mutation | None = None,
    replaced: Mapping[str, Any] = {},
    at_once: int = 3,
) -> Iterator[list[launching.Launch]]:
    """Run what is launched on tensors of the CPU as on a Hopper GPU: Gluon kernels here, Triton's interpreted."""
    launches = _Emulated(order, seed, mutation, replaced, at_once)
    launching._recorded, launching._capability = launches, (9, 0)
    try:
        yield launches
    finally:
        launching._recorded = launching._capability = None
