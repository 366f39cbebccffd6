"""Times of the kernel library's ops, as shares of the roofline that the ceilings of the same run draw."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.costs import Cost
from .ops import OpCase, Variant, op_cases
from .timing import time_variants

# No CPU takes so long to launch a call.
LONG_MS = 10.0


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reached in this run: a copy's bandwidth in bytes/s, a bfloat16 product's speed in FLOP/s."""

    copy: float
    matmul: float


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _train(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A fresh copy for each variant, because some peers write into their inputs; floating-point ones get gradients, but not
    # tables in float32, such as RoPE's.
    return tuple(t.clone().requires_grad_(t.dtype == torch.bfloat16) for t in inputs)


def _agrees(variant: Variant, yardstick: Variant, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the error against float32 is at most twice PyTorch's, plus one rounding of the largest value."""
    with torch.no_grad():
        exact = _tensors(yardstick(*(t.float() if t.dtype == torch.bfloat16 else t for t in inputs)))
        for own, torchs, right in zip(_tensors(variant(*inputs)), _tensors(yardstick(*inputs)), exact, strict=True):
            rounding = torch.finfo(torch.bfloat16).eps * right.abs().max()
            if (own.float() - right).abs().max() > 2 * (torchs.float() - right).abs().max() + rounding:
                return False
    return True


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


def _ready(
    case: OpCase, direction: str, inputs: tuple[Tensor, ...], agreed: set[str], failed: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """Return the call of each variant, tried once; one that fails or disagrees goes into `failed` with its reason."""
    ready = {}
    for name, variant in case.variants.items():
        if name in failed or (name in case.fused and direction != "both"):
            continue
        try:
            if name not in agreed and not _agrees(variant, case.variants["torch"], tuple(t.clone() for t in inputs)):
                failed[name] = "more than twice PyTorch's error"
                continue
            agreed.add(name)
            call = getattr(_Calls(variant, inputs), direction)()
            call()
            ready[name] = call
        except Exception as error:  # a peer's failure, or a lack of memory, is a result and not the end of the bench
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    return ready


def timed_rows(
    case: str,
    calls: Mapping[str, Callable[[], object]],
    cost: Cost,
    device: torch.device,
    ceilings: Ceilings,
    memory: bool = False,
    rounds: int = 5,
) -> Iterator[dict[str, Any]]:
    """Yield the row of each of `calls`, timed in turn; `memory` adds the peak of what a call holds beyond its inputs."""
    for name, times in time_variants(calls, device, rounds).items():
        seconds = times.p50_ms * 1e-3
        share = cost.seconds(ceilings.copy, ceilings.matmul) / seconds
        row: dict[str, Any] = {
            "case": case,
            "variant": name,
            **asdict(times),
            "gb_per_s": cost.bytes / seconds / 1e9,
            "tflop_per_s": cost.flops / seconds / 1e12,
            "share_of_roofline": share,
        }
        if share > 1:
            row["suspicious"] = "above the ceiling"
        if device.type == "cuda" and times.p50_ms < LONG_MS:
            row["enqueue_ms"] = _enqueue_ms(calls[name])
            torch.cuda.synchronize(device)
            if row["enqueue_ms"] > times.p50_ms / 2:
                row["suspicious"] = "the CPU's launches may be what was timed"
        if device.type == "cuda" and memory:
            row["peak_gb"] = _peak_gb(calls[name], device)
        yield row


def bench_case(case: OpCase, device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield the times of one op's variants, forward, backward and both; a variant that errs is named instead of timed."""
    torch.manual_seed(0)
    inputs = case.make(device)
    agreed: set[str] = set()
    failed: dict[str, str] = {}
    # In this order: a compiled variant keeps its buffers from its first backward pass on only where that retains them.
    for direction, cost in (("forward", case.forward), ("backward", case.backward), ("both", case.both)):
        if cost is None:
            continue
        reported = set(failed)
        ready = _ready(case, direction, inputs, agreed, failed)
        for name in failed.keys() - reported:
            yield {"case": f"{case.name} {direction}", "variant": name, "not_measured": failed[name]}
        yield from timed_rows(f"{case.name} {direction}", ready, cost, device, ceilings, memory=direction == "both")


def bench_kernels(device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield the times of every op at every shape."""
    for case in op_cases():
        yield from bench_case(case, device, ceilings)
        torch.compiler.reset()
        torch.cuda.empty_cache()
