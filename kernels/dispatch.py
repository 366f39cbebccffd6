"""Which backend runs an op: Triton kernels or the PyTorch reference. The one place that knows whether Triton is there."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .launch import is_recording

Backend = Literal["auto", "triton", "reference"]

# Triton publishes wheels for Linux only; everywhere else the reference runs.
HAS_TRITON = importlib.util.find_spec("triton") is not None

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.knobs
    import triton.language as tl

    jit: Any = triton.jit
else:
    # Stand-ins with which a kernel can be defined, but never launched.
    tl = SimpleNamespace(constexpr=None)

    def jit(function=None, **options):
        """Return `function` as it is."""
        return (lambda function: function) if function is None else function


_backend: Backend = "auto"


def get_backend() -> Backend:
    """Return the backend in force: `auto` runs Triton on CUDA tensors and the reference elsewhere."""
    return _backend


def set_backend(backend: Backend) -> None:
    """Choose the backend for the whole process: `auto`, `triton` or `reference`."""
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(get_args(Backend))}")
    _backend = backend


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run a block under another backend."""
    before = get_backend()
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


# Read once, as `jit` reads it where a kernel is defined.
_INTERPRETING: bool = HAS_TRITON and triton.knobs.runtime.interpret


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is under way, which no kernel has a rule for."""
    # Dynamo traces through the transforms of torch.func itself.
    if torch.compiler.is_compiling():
        return False
    return is_forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether the op with these inputs runs its Triton kernel; raises where the forced backend cannot run.

    The first one's device decides. The reference runs what the kernels do not have: float64, and the transforms of `torch.func`
    (vmap, grad, jvp) and forward-mode derivatives.
    """
    if _backend == "reference":
        return False
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return False
    if is_recording():
        return True
    x = tensors[0]
    assert x is not None
    if is_transformed():
        if x.is_cuda:
            warnings.warn("under torch.func or forward-mode AD the slower PyTorch reference runs", stacklevel=3)
        return False
    if _backend == "auto":
        if x.is_cuda and not HAS_TRITON:
            warnings.warn("Triton cannot be imported: the slower PyTorch reference runs on the GPU", stacklevel=3)
        return x.is_cuda and HAS_TRITON
    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton' needs the package triton, which exists for Linux only: choose 'auto' or 'reference'"
        )
    if not (x.is_cuda or interpreting()):
        raise RuntimeError(f"backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1; got a tensor on {x.device}")
    return True


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast wants products of `x`, or None without it, and for float64."""
    kind = x.device.type
    # Of the devices that hold tensors "meta" alone has no autocast. PyTorch 2.11 cannot compile a question whether one has.
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
