"""The single entry point for Triton launches. It can also record launches for a GPU that is not present."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one recorded launch; its tensors are on the device `meta`."""

    kernel: Any
    num_programs: int
    args: tuple[Any, ...]
    constants: Mapping[str, Any]


_recorded: list[Launch] | None = None
_capability: tuple[int, int] | None = None


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Record the launches of ops on tensors of the device `meta`, for a GPU of this compute capability."""
    global _recorded, _capability
    _recorded, _capability = [], capability
    try:
        yield _recorded
    finally:
        _recorded = _capability = None


def is_recording() -> bool:
    """Whether launches are recorded instead of run."""
    return _recorded is not None


def recorded_capability() -> tuple[int, int] | None:
    """Return the compute capability that launches are recorded for; None while they run."""
    return _capability


def launch(kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
    """Run `num_programs` programs of a kernel on the device of its first tensor; Triton itself uses the current device."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, num_programs, args, constants))
        return
    for x in args:
        if isinstance(x, Tensor):
            break
    else:
        raise ValueError("a launch has no tensor argument: expected one, because its device runs the kernel")
    # `torch.cuda.current_device` would check first that CUDA is initialized, which a CUDA tensor implies.
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        # Same as kernel[grid](...), with one Python call fewer.
        kernel.run(*args, grid=(num_programs,), warmup=False, **constants)
        return
    with torch.cuda.device(x.device):
        kernel.run(*args, grid=(num_programs,), warmup=False, **constants)
