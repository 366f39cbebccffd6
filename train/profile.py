"""Break down the time of a step by kernel group. Time without a kernel is idle."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from ..kernels.op import ALL

Group = Literal["matmul", "attention", "own", "elementwise", "optimizer", "copy", "communication", "idle"]
"""own: this project's kernels other than attention (norms, SwiGLU, RoPE, cross-entropy). elementwise: all other bandwidth-bound
kernels (activations, reductions, embeddings, compiler-fused loops)."""
GROUPS: tuple[Group, ...] = get_args(Group)

# The first match decides. The patterns match names of CUDA kernels (cuBLAS, CUTLASS, cuDNN, Inductor, Triton), and names of
# operators in CPU profiles.
_PATTERNS: tuple[tuple[Group, str], ...] = (
    # Inductor names a fused loop after nearby operators, which can include matrix products and attention.
    ("elementwise", r"^triton_(poi|red|per|mix)_"),
    ("communication", r"nccl|c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("copy", r"memcpy|memset|^aten::(copy_|_to_copy|zero_|fill_)$"),
    ("optimizer", r"multi_tensor_apply|adamw?|_foreach_|triton_for_|muon|newton_?schulz"),
    ("attention", r"attention|flash_|fmha|sdpa"),
    ("matmul", r"gemm|gemv|nvjet|cublas|cutlass|xmma|splitk|(_|^)mm(_|$)|wgmma|matmul"),
    ("matmul", r"^aten::(mm|bmm|addmm|baddbmm|linear|_scaled_mm)$|mkldnn_linear"),
)
_COMPILED: tuple[tuple[Group, re.Pattern[str]], ...] = tuple(
    (group, re.compile(pattern, re.IGNORECASE)) for group, pattern in _PATTERNS
)


@dataclass(frozen=True)
class Event:
    """One kernel on a GPU, or one operator on a CPU; times in seconds."""

    name: str
    start: float
    end: float


@cache
def _own_groups() -> dict[str, Group]:
    return {kernel.__name__: op.group for op in ALL.values() for kernel in op.kernels}


def classify(kernel_name: str) -> Group:
    """Return the group of a kernel or operator, given its name."""
    own = _own_groups().get(kernel_name)
    if own is not None:
        return own
    if kernel_name.startswith("tilewright::"):
        return "attention" if kernel_name.startswith("tilewright::attention") else "own"
    for group, pattern in _COMPILED:
        if pattern.search(kernel_name):
            return group
    return "elementwise"


def breakdown(events: Iterable[Event], seconds: float | None = None) -> dict[Group, float]:
    """Return the seconds of each group. They sum to `seconds`, by default the span from the first start to the last end.

    Time in which events overlap counts once, for the event that started first. Profiling slows down the host but not the
    kernels: pass the `seconds` of the same work without the profiler to get the true idle time. If the kernels take longer than
    `seconds`, idle is 0 and the sum exceeds `seconds`.
    """
    groups: dict[Group, float] = dict.fromkeys(GROUPS, 0.0)
    ordered = sorted(events, key=lambda event: (event.start, event.end))
    covered = ordered[0].start if ordered else 0.0
    begin = covered
    for event in ordered:
        groups[classify(event.name)] += max(0.0, event.end - max(event.start, covered))
        covered = max(covered, event.end)
    busy = sum(groups.values())
    groups["idle"] = max(0.0, (covered - begin if seconds is None else seconds) - busy)
    return groups


def make_profiler(activities: Iterable[torch.profiler.ProfilerActivity]) -> torch.profiler.profile:
    """Return a profiler that prints nothing.

    Kineto logs every start and stop of a profile to stderr, at a severity (USDT, 5) above that of errors. It reads
    KINETO_LOG_LEVEL when a process starts its first profile.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    # There is one cycle. Without acc_events PyTorch 2.11 warns that it keeps only the events of the last one.
    return torch.profiler.profile(activities=activities, acc_events=True)


def profiled_events(profiler: torch.profiler.profile) -> list[Event]:
    """Return the GPU kernels of a finished profiler, or the CPU operators if there are no kernels.

    The time of an operator excludes the operators that it calls.
    """
    seen = list(profiler.events() or ())
    # CPU annotations, such as the optimizer step, also appear as GPU events that span their kernels.
    kernels = [event for event in seen if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    if kernels:
        return [Event(event.name, event.time_range.start * 1e-6, event.time_range.end * 1e-6) for event in kernels]
    events = []
    for event in seen:
        if event.name.startswith(("aten::", "tilewright::", "mkldnn::")):
            start = event.time_range.start
            for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
                events.append(Event(event.name, start * 1e-6, child.time_range.start * 1e-6))
                start = child.time_range.end
            events.append(Event(event.name, start * 1e-6, event.time_range.end * 1e-6))
    return events
