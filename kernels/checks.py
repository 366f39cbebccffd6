"""What every op asks of its arguments, on both backends alike: each check names the value and what is allowed."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What ops compute with; float64 runs the reference."""
INTEGER = (torch.int64, torch.int32)


def _listed(allowed: Iterable[Any]) -> str:
    *others, last = map(str, allowed)
    return f"{', '.join(others)} or {last}" if others else last


def check_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Refuse tensors of another dtype than those `allowed`."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in allowed:
            raise ValueError(f"{name} has dtype {x.dtype}: allowed is {_listed(allowed)}")


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not on the device of the first one."""
    (first_name, first), *others = ((name, x) for name, x in tensors.items() if x is not None)
    for name, x in others:
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}: allowed is {first.device}, the device of {first_name}")


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


def check_softcap(softcap: float | None) -> None:
    """Refuse a softcap that is no finite number above 0; None passes."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}: allowed is a finite number above 0, or None")


def is_readable(x: Tensor) -> bool:
    """Whether values can be looked at here: on a GPU that would need a synchronisation, and traced tensors hold none."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return x.is_cpu and type(x) is Tensor and not traced
