"""Where the time of a step goes: every kernel that a profiler saw in one of a few groups, and the rest idle."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from ..kernels.op import ALL

Group = Literal["matmul", "attention", "own", "elementwise", "optimizer", "copy", "communication", "idle"]
"""own are the other kernels of this project: norms, SwiGLU, RoPE, cross-entropy; elementwise is all else that is bound by
bandwidth: activations, reductions, embeddings, and what a compiler fused."""
GROUPS: tuple[Group, ...] = get_args(Group)

# The first that matches decides. Names are those of CUDA kernels (cuBLAS, CUTLASS, cuDNN, Inductor, Triton), and of the
# operators that stand for them in a profile of a CPU.
_PATTERNS: tuple[tuple[Group, str], ...] = (
    # Inductor names a fused loop after the operators around it, products and attention too.
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
    """One kernel on a device, or one operator on a CPU; times in seconds."""

    name: str
    start: float
    end: float


@cache
def _own_groups() -> dict[str, Group]:
    return {kernel.__name__: op.group for op in ALL.values() for kernel in op.kernels}


def classify(kernel_name: str) -> Group:
    """Return the group of a kernel or operator by its name."""
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
    """Return the seconds of each group; they sum up to `seconds`, by default from the first start to the last end.

    Where events overlap, the time goes to the one that began first, so that nothing counts twice. Profiling slows the CPU down
    but no kernel: with the `seconds` that the same work takes without a profiler, what is idle is right, too. Work that took
    longer than `seconds` leaves nothing idle, and its own sum.
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


def profiled_events(profiler: torch.profiler.profile) -> list[Event]:
    """Return the kernels that a finished profiler saw on GPUs; where it saw none, the operators on the CPU.

    An operator's time is its own, without that of operators that it calls.
    """
    seen = list(profiler.events() or ())
    # An annotation of the CPU, such as the optimizer's step, shows on the GPU as well, around its kernels.
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
