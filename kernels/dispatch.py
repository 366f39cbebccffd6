"""Backend selection: Triton kernels or the PyTorch reference. Only this module checks whether Triton is installed."""

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
    # Stand-ins: a kernel can be defined with them, but not launched.
    tl = SimpleNamespace(constexpr=None)

    def jit(function=None, **options):
        """Return `function` as it is."""
        return (lambda function: function) if function is None else function


_backend: Backend = "auto"


def get_backend() -> Backend:
    """Return the current backend: `auto` runs Triton on CUDA tensors and the reference elsewhere."""
    return _backend


def set_backend(backend: Backend) -> None:
    """Set the backend of the whole process: `auto`, `triton` or `reference`."""
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(get_args(Backend))}")
    _backend = backend


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Use another backend inside a `with` block."""
    before = get_backend()
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


# Read once at import, because `jit` reads it when a kernel is defined.
_INTERPRETING: bool = HAS_TRITON and triton.knobs.runtime.interpret


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active; kernels support neither."""
    # Dynamo itself traces through `torch.func` transforms.
    if torch.compiler.is_compiling():
        return False
    return is_forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether an op with these inputs runs its Triton kernel; raise if the forced backend cannot run.

    The device of the first tensor decides. The reference runs float64, `torch.func` transforms (vmap, grad, jvp) and
    forward-mode derivatives, because the kernels do not support them.
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
            warnings.warn("torch.func transforms and forward-mode AD run the slower PyTorch reference", stacklevel=3)
        return False
    if _backend == "auto":
        if x.is_cuda and not HAS_TRITON:
            warnings.warn("Triton is not installed: the slower PyTorch reference runs on the GPU", stacklevel=3)
        return x.is_cuda and HAS_TRITON
    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton' needs the package triton, which is available on Linux only: choose 'auto' or 'reference'"
        )
    if not (x.is_cuda or interpreting()):
        raise RuntimeError(f"backend 'triton' needs a CUDA tensor, or TRITON_INTERPRET=1; got a tensor on {x.device}")
    return True


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast uses for products of `x`; None without autocast, and for float64."""
    kind = x.device.type
    # Only "meta" has no autocast. PyTorch 2.11 cannot compile a check for autocast support.
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
