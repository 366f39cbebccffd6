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
from .jobs import Job, Row, Rows
from .ops import OpCase, Variant, op_cases
from .timing import time_variants

# No CPU takes so long to launch a call.
LONG_MS = 10.0


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _train(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A fresh copy for each variant, because some peers write into their inputs; floating-point ones get gradients, but not
    # tables in float32, such as RoPE's.
    return tuple(t.clone().requires_grad_(t.dtype == torch.bfloat16) for t in inputs)


class WrongError(Exception):
    """A variant whose results are further off than rounding explains."""


def _compute(variant: Variant, inputs: tuple[Tensor, ...], exactly: bool, backward: bool) -> dict[str, Tensor]:
    """Return a variant's outputs, and its gradients for gradients of the outputs that are the same for all variants."""
    is_half = [t.dtype == torch.bfloat16 for t in inputs]
    copies = [t.float() if exactly and half else t.clone() for t, half in zip(inputs, is_half, strict=True)]
    leaves = [t.requires_grad_(backward and half) for t, half in zip(copies, is_half, strict=True)]
    outputs = _tensors(variant(*leaves))
    results = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
    if not backward:
        return results
    generator = torch.Generator(inputs[0].device).manual_seed(1)

    def draw(y: Tensor) -> Tensor:
        drawn = torch.randn(y.shape, generator=generator, device=y.device).bfloat16()
        return drawn.to(y.dtype) if y.dim() else torch.ones_like(y)

    wanted = [t for t, half in zip(leaves, is_half, strict=True) if half]
    # A compiled variant keeps its buffers from its first backward pass on only where that retains them.
    gradients = torch.autograd.grad(outputs, wanted, tuple(map(draw, outputs)), retain_graph=True)
    return results | {f"gradient {i}": dx for i, dx in enumerate(gradients)}


def _check(variant: Variant, yardstick: Variant, inputs: tuple[Tensor, ...], backward: bool) -> None:
    """Raise where an error against float32 is above twice PyTorch's, plus one rounding of the largest value."""
    exact = _compute(yardstick, inputs, True, backward)
    torchs = _compute(yardstick, inputs, False, backward)
    for name, own in _compute(variant, inputs, False, backward).items():
        right = exact[name]
        rounding = torch.finfo(torch.bfloat16).eps * right.abs().max()
        allowed = 2 * (torchs[name].float() - right).abs().max() + rounding
        if not (own.float() - right).abs().max() <= allowed:  # NaN too
            raise WrongError(f"{name} has more than twice PyTorch's error")


def _gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A loss is differentiated by itself: some peers save the scaling by its gradient where that is one.
    return tuple(torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs)


class _Calls:
    """The calls to time for one variant."""

    def __init__(self, variant: Variant, inputs: tuple[Tensor, ...]) -> None:
        self.variant, self.inputs = variant, _train(inputs)
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


def prepare(case: OpCase, direction: str, name: str, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the call to time for one variant, tried once; its results, or its gradients, are right, else `WrongError`."""
    variant = case.variants[name]
    _check(variant, case.variants["torch"], inputs, backward=direction != "forward")
    call = getattr(_Calls(variant, inputs), direction)()
    call()
    return call


def directions(case: OpCase) -> dict[str, Cost]:
    """Return what is timed of a case, and its cost."""
    costs = {"forward": case.forward, "backward": case.backward, "both": case.both}
    return {direction: cost for direction, cost in costs.items() if cost is not None}


def _ready(case: OpCase, direction: str, inputs: tuple[Tensor, ...], so_far: _Progress) -> dict[str, Callable[[], object]]:
    """Return the call of each variant; one that fails or disagrees goes into `failed` with its reason."""
    ready = {}
    for name in case.variants:
        if name in so_far.failed or (name in case.fused and direction != "both"):
            continue
        start = time.perf_counter()
        try:
            ready[name] = prepare(case, direction, name, inputs)
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
    """Yield the row of each of `calls`, timed in turn; `memory` adds the peak of what a call holds beyond its inputs."""
    for name, times in time_variants(calls, device, rounds).items():
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


def bench_case(case: OpCase, device: torch.device, ceilings: Ceilings) -> Rows:
    """Yield the times of one op's variants, forward, backward and both; a variant that errs is named instead of timed."""
    torch.manual_seed(0)
    inputs = case.make(device)
    so_far = _Progress()
    for name, reason in case.missing.items():
        yield {"case": case.name, "variant": name, "not_measured": reason}
    for direction, cost in directions(case).items():
        reported = set(so_far.failed)
        ready = _ready(case, direction, inputs, so_far)
        for name in so_far.failed.keys() - reported:
            yield {"case": f"{case.name} {direction}", "variant": name, "not_measured": so_far.failed[name]}
        for row in timed_rows(f"{case.name} {direction}", ready, cost, device, ceilings, memory=direction == "both"):
            yield row | {"ready_s": so_far.ready_s[row["variant"]], "op": f"{case.op} {direction}", "size": case.size}


def kernel_jobs(device: torch.device, ceilings: Ceilings) -> Iterator[Job]:
    """Yield the measuring of every op at every shape."""
    for case in op_cases():
        yield Job(case.name, partial(bench_case, case, device, ceilings))
