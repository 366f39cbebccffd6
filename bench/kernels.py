"""Times of the kernel library's ops, as shares of the roofline that the ceilings of the same run draw."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.costs import Cost
from .ceilings import Ceilings
from .check import Right, WrongError, check, copies, what_is_right
from .jobs import Job, Row, Rows
from .ops import OpCase, Variant, op_cases
from .timing import time_variants

# No CPU takes so long to launch a call.
LONG_MS = 10.0


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A loss is differentiated by itself: some peers save the scaling by its gradient where that is one.
    return tuple(torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs)


class _Calls:
    """The calls to time for one variant."""

    def __init__(self, variant: Variant, inputs: tuple[Tensor, ...]) -> None:
        self.variant, self.inputs = variant, copies(inputs)
        self.wanted = [t for t in self.inputs if t.requires_grad]

    def forward(self) -> Callable[[], object]:
        detached = [t.detach() for t in self.inputs]
        return lambda: self.variant(*detached)

    def backward(self) -> Callable[[], object]:
        outputs = _tensors(self.variant(*self.inputs))
        gradients = _gradients(outputs)
        return lambda: torch.autograd.grad(outputs, self.wanted, gradients, retain_graph=True)

    def both(self) -> Callable[[], object]:
        gradients = _gradients(_tensors(self.variant(*self.inputs)))
        return lambda: torch.autograd.grad(_tensors(self.variant(*self.inputs)), self.wanted, gradients)


def _peak_gb(call: Callable[[], object], device: torch.device) -> float:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def _enqueue_ms(call: Callable[[], object]) -> float:
    """Return how long the CPU takes to hand a call to the GPU: a GPU that is done sooner waits for it."""
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return sorted(samples)[2]


@dataclass
class _Progress:
    """What is known of a case's variants so far."""

    failed: dict[str, str] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    """Seconds until a variant had been compiled, checked and called once."""
    notes: dict[str, str | None] = field(default_factory=dict)


def prepare(
    case: OpCase, direction: str, name: str, inputs: tuple[Tensor, ...], right: Mapping[str, Right] | None
) -> tuple[Callable[[], object], str | None]:
    """Return the call to time for one variant, tried once, and what is to be noted on its results and gradients.

    Wrong ones are a `WrongError`; without `right` they were looked at before.
    """
    variant = case.variants[name]
    note = check(variant, inputs, right, backward=direction != "forward") if right is not None else None
    call = getattr(_Calls(variant, inputs), direction)()
    call()
    return call, note


def directions(case: OpCase) -> dict[str, Cost]:
    """Return what is timed of a case, and its cost."""
    costs = {"forward": case.forward, "backward": case.backward, "both": case.both}
    return {direction: cost for direction, cost in costs.items() if cost is not None}


def _ready(
    case: OpCase, direction: str, inputs: tuple[Tensor, ...], right: Mapping[str, Right], so_far: _Progress
) -> dict[str, Callable[[], object]]:
    """Return the call of each variant; one that fails or disagrees goes into `failed` with its reason."""
    ready = {}
    for name in case.variants:
        if name in so_far.failed or (name in case.fused and direction != "both"):
            continue
        start = time.perf_counter()
        try:
            # Both ways together it computes what it did backward.
            known = direction == "both" and name in so_far.ready_s and "backward" in directions(case)
            ready[name], note = prepare(case, direction, name, inputs, None if known else right)
            so_far.notes[name] = so_far.notes[name] if known else note
            if inputs[0].is_cuda:
                torch.cuda.synchronize(inputs[0].device)
            so_far.ready_s[name] = time.perf_counter() - start
        except WrongError as error:
            so_far.failed[name] = f"wrong: {error}"
        except Exception as error:  # a peer's failure, or a lack of memory, is a result and not the end of the bench
            so_far.failed[name] = f"{type(error).__name__}: {error}"[:200]
    return ready


def timed_rows(
    case: str,
    calls: Mapping[str, Callable[[], object]],
    cost: Cost,
    device: torch.device,
    ceilings: Ceilings,
    memory: bool = False,
    rounds: int = 5,
) -> Rows:
    """Yield the row of each of `calls`, timed in turn; `memory` adds the peak of what a call holds beyond its inputs.

    One that fails meanwhile, for lack of memory for one, is named with the reason.
    """
    failed: dict[str, str] = {}
    for name, times in time_variants(calls, device, rounds, failed=failed).items():
        seconds = times.p50_ms * 1e-3
        row: Row = {
            "case": case,
            "variant": name,
            **asdict(times),
            "gb_per_s": cost.bytes / seconds / 1e9,
            "tflop_per_s": cost.flops / seconds / 1e12,
            **ceilings.shares(cost, seconds),
        }
        if device.type == "cuda" and times.p50_ms < LONG_MS:
            row["enqueue_ms"] = _enqueue_ms(calls[name])
            torch.cuda.synchronize(device)
            if row["enqueue_ms"] > times.p50_ms / 2:
                row.setdefault("suspicious", "the CPU's launches may be what was timed")
        if device.type == "cuda" and memory:
            row["peak_gb"] = _peak_gb(calls[name], device)
        yield row
    for name, reason in failed.items():
        yield {"case": case, "variant": name, "not_measured": reason}


def bench_case(case: OpCase, device: torch.device, ceilings: Ceilings) -> Rows:
    """Yield the times of one op's variants, forward, backward and both; a variant that errs is named instead of timed."""
    torch.manual_seed(0)
    inputs = case.make(device)
    so_far = _Progress()
    right = what_is_right(case.oracle, case.variants["torch"], inputs)
    for name, reason in case.missing.items():
        yield {"case": case.name, "variant": name, "not_measured": reason}
    for direction, cost in directions(case).items():
        reported = set(so_far.failed)
        ready = _ready(case, direction, inputs, right, so_far)
        for name in so_far.failed.keys() - reported:
            yield {"case": f"{case.name} {direction}", "variant": name, "not_measured": so_far.failed[name]}
        for row in timed_rows(f"{case.name} {direction}", ready, cost, device, ceilings, memory=direction == "both"):
            if "not_measured" in row:
                yield row
                continue
            note = so_far.notes[row["variant"]]
            noted = {"suspicious": "; ".join(filter(None, (row.get("suspicious"), note)))} if note else {}
            ready_s = so_far.ready_s[row["variant"]]
            yield row | noted | {"ready_s": ready_s, "op": f"{case.op} {direction}", "size": case.size}


def kernel_jobs(device: torch.device, ceilings: Ceilings) -> Iterator[Job]:
    """Yield the measuring of every op at every shape."""
    for case in op_cases():
        yield Job(case.name, partial(bench_case, case, device, ceilings))
