"""Launches of Triton kernels: the one way there, which can also write down what would be launched on a GPU that is not here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch, tensors among them without contents."""

    kernel: Any
    num_programs: int
    args: tuple[Any, ...]
    constants: Mapping[str, Any]


_recorded: list[Launch] | None = None
_capability: tuple[int, int] | None = None


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Write down the launches of ops on tensors of the device `meta`, as they would be on a GPU of this compute capability."""
    global _recorded, _capability
    _recorded, _capability = [], capability
    try:
        yield _recorded
    finally:
        _recorded = _capability = None


def is_recording() -> bool:
    """Whether launches are written down."""
    return _recorded is not None


def recorded_capability() -> tuple[int, int] | None:
    """Return the compute capability for which launches are written down, if they are."""
    return _capability


def launch(kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
    """Run `num_programs` programs of a kernel on the device of its first tensor, because Triton launches on the current one."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, num_programs, args, constants))
        return
    for x in args:
        if isinstance(x, Tensor):
            break
    else:
        raise ValueError("a launch needs a tensor, whose device it runs on")
    # torch.cuda.current_device would first look whether CUDA is initialised, which a tensor of it says already.
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        # What kernel[grid](...) calls, less one call that hands all arguments on.
        kernel.run(*args, grid=(num_programs,), warmup=False, **constants)
        return
    with torch.cuda.device(x.device):
        kernel.run(*args, grid=(num_programs,), warmup=False, **constants)
