"""What every op asks of its arguments, on both backends alike: each check names the value and what is allowed."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What ops compute with; float64 runs the reference."""
INTEGER = (torch.int64, torch.int32)
NUMBERS = (Real, torch.SymInt, torch.SymFloat)


def _listed(allowed: Iterable[Any]) -> str:
    *others, last = map(str, allowed)
    return f"{', '.join(others)} or {last}" if others else last


def check_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Refuse tensors of another dtype than those `allowed`."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: allowed is a tensor")
        if x is not None and x.dtype not in allowed:
            raise ValueError(f"{name} has dtype {x.dtype}: allowed is {_listed(allowed)}")


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not on the device of the first one."""
    first_name, device = "", None
    for name, x in tensors.items():
        if x is None:
            continue
        if device is None:
            first_name, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} is on {x.device}: allowed is {device}, the device of {first_name}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is none of those `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose {_listed(map(repr, allowed))}")


def check_int(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Refuse what is no integer from `least` to `most`; None passes."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or not least <= value <= most
    ):
        allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{name} is {value!r}: allowed is an integer, {allowed}")


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> None:
    """Refuse what is no finite number from `least` to `most`, and `above` another."""
    # Most are floats, and asking whether something is a Real takes long.
    comparable = type(value) is float or (isinstance(value, NUMBERS) and not isinstance(value, bool))
    x: Any = value
    if not comparable or not (least <= x <= most and above < x and -math.inf < x < math.inf):
        allowed = f" above {above}" if above > -math.inf else ""
        if least > -math.inf:
            allowed = f", {least} or more" if most == math.inf else f", {least} to {most}"
        raise ValueError(f"{name} is {value!r}: allowed is a finite number{allowed}")


def check_cu_seqlens(**cumulative: Tensor | None) -> None:
    """Refuse cumulative lengths that are no row of integers, or that decrease, where that can be seen."""
    check_dtype(INTEGER, **cumulative)
    for name, x in cumulative.items():
        if x is not None and x.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: allowed is one row, cumulative lengths")
        if x is not None and is_readable(x) and (x.diff(prepend=x.new_zeros(1)) < 0).any():
            raise ValueError(f"{name} is {x.tolist()}: allowed are lengths from 0 on that do not decrease")


def is_readable(x: Tensor) -> bool:
    """Whether values can be looked at here: on a GPU that would need a synchronisation, and traced tensors hold none."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return x.is_cpu and type(x) is Tensor and not traced
