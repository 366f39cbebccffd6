"""Run warp-specialized Gluon kernels in NumPy, from their own source, under a controlled order of asynchronous events.

Each warp partition is a thread, and one thread runs at a time. A thread yields at each barrier, copy and product; a seeded
choice selects the next thread. Asynchronous operations of the hardware are separate events: a TMA copy fills its target with
NaN at once and with data later; a product reads its operands in shared memory at any time between its issue and its wait. There
are three orders: `early` runs events at once, `late` runs them when no thread can continue, `random` runs them at any time. A
buffer that is freed, read or overwritten too early gives wrong numbers in at least one order; a wrong phase raises `Deadlock`.
A few programs run concurrently. They start in order, and yield to each other before they write or poll global memory.

The emulator verifies barriers and their phases, buffers, the order of products, masks, all sums, and that no program waits for
one that starts later. It rounds bfloat16 to nearest even and accumulates in float32. A generic write to shared memory without
`fence_async_shared` before a product or a TMA copy reads it is an error. Only tests on a GPU can verify layouts (the compiler
checks that they fit), the encoding and the swizzling of descriptors, memory ordering within a partition, between its warps and
between programs, the start order of programs on a GPU, and register usage.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tilewright.kernels import launch as launching

from .grid import Grid
from .language import Descriptor
from .program import ORDERS, Deadlock
from .translate import Mutation, StaleMutation, translate
from .values import DType, Pointer

__all__ = ["ORDERS", "DType", "Deadlock", "Mutation", "StaleMutation", "emulate", "emulating"]


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
    """Run all programs of a launch on CPU tensors, in place, `at_once` programs at a time.

    `replaced` maps names of device functions to Python functions that replace them.
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
    if mutation is not None and mutation.kernel != launch.kernel.__name__:
        mutation = None
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
    """Run launches on CPU tensors as on a Hopper GPU: Gluon kernels in the emulator, Triton kernels in the interpreter."""
    launches = _Emulated(order, seed, mutation, replaced, at_once)
    launching._recorded, launching._capability = launches, (9, 0)
    try:
        yield launches
    finally:
        launching._recorded = launching._capability = None
