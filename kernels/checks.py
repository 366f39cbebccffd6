"""Argument checks shared by all ops and both backends; each error names the value and what is expected."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that ops compute with; float64 runs the reference."""
INTEGER = (torch.int64, torch.int32)
NUMBERS = (Real, torch.SymInt, torch.SymFloat)


def _listed(allowed: Iterable[Any]) -> str:
    *others, last = map(str, allowed)
    return f"{', '.join(others)} or {last}" if others else last


def check_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Raise unless each tensor has one of the `allowed` dtypes; None passes."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a tensor")
        if x is not None and x.dtype not in allowed:
            raise ValueError(f"{name} has dtype {x.dtype}: expected {_listed(allowed)}")


def check_device(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are on the device of the first one; None passes."""
    first_name, device = "", None
    for name, x in tensors.items():
        if x is None:
            continue
        if device is None:
            first_name, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} is on {x.device}: expected {device}, the device of {first_name}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose {_listed(map(repr, allowed))}")


def check_int(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Raise unless `value` is an integer from `least` to `most`; None passes."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or not least <= value <= most
    ):
        allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}: expected an integer, {allowed}")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> None:
    """Raise unless `value` is a finite number from `least` to `most` and greater than `above`."""
    # Most values are floats, and `isinstance` with the abstract class Real is slow.
    comparable = type(value) is float or (isinstance(value, NUMBERS) and not isinstance(value, bool))
    x: Any = value
    if not comparable or not (least <= x <= most and above < x and -math.inf < x < math.inf):
        allowed = f" above {above}" if above > -math.inf else ""
        if least > -math.inf:
            allowed = f", {least} or more" if most == math.inf else f", {least} to {most}"
        raise ValueError(f"{name} is {value!r}: expected a finite number{allowed}")


def check_cu_seqlens(**cumulative: Tensor | None) -> None:
    """Raise unless each tensor is 1-D and of integers; readable values must also be 0 or more and not decrease."""
    check_dtype(INTEGER, **cumulative)
    for name, x in cumulative.items():
        if x is not None and x.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected a 1-D tensor of cumulative lengths")
        if x is not None and is_readable(x) and (x.diff(prepend=x.new_zeros(1)) < 0).any():
            raise ValueError(f"{name} is {x.tolist()}: expected non-decreasing lengths, 0 or more")


def is_readable(x: Tensor) -> bool:
    """Whether the host can read the values: on a GPU that would synchronize, and traced tensors have none."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return x.is_cpu and type(x) is Tensor and not traced
