"""Times of the kernel library's ops, as shares of the roofline that the ceilings of the same run draw."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.costs import Cost
from .ops import OpCase, Variant, op_cases
from .timing import time_variants


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
        gradients = tuple(torch.randn_like(y) for y in outputs)
        return lambda: torch.autograd.grad(outputs, self.wanted, gradients, retain_graph=True)

    def both(self) -> Callable[[], object]:
        gradients = tuple(torch.randn_like(y) for y in _tensors(self.variant(*self.inputs)))
        return lambda: torch.autograd.grad(_tensors(self.variant(*self.inputs)), self.wanted, gradients)


def _peak_memory(call: Callable[[], object], device: torch.device) -> float:
    call()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def bench_case(case: OpCase, device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield the times of one op's variants, forward, backward and both; a variant that errs is named instead of timed."""
    torch.manual_seed(0)
    inputs = case.make(device)
    calls: dict[str, _Calls] = {}
    for name, variant in case.variants.items():
        try:
            agrees = _agrees(variant, case.variants["torch"], tuple(t.clone() for t in inputs))
        except Exception as error:  # a peer's failure is a result, not the end of the bench
            yield {"case": case.name, "variant": name, "not_measured": f"{type(error).__name__}: {error}"[:200]}
            continue
        if not agrees:
            yield {"case": case.name, "variant": name, "not_measured": "more than twice PyTorch's error"}
            continue
        calls[name] = _Calls(variant, inputs)
    costs: Mapping[str, Cost | None] = {"forward": case.forward, "backward": case.backward, "both": case.both}
    for direction, cost in costs.items():
        if cost is None:
            continue
        ready = {
            name: getattr(call, direction)() for name, call in calls.items() if direction == "both" or name not in case.fused
        }
        for name, times in time_variants(ready, device).items():
            seconds = times.p50_ms * 1e-3
            share = cost.seconds(ceilings.copy, ceilings.matmul) / seconds
            yield {
                "case": f"{case.name} {direction}",
                "variant": name,
                **asdict(times),
                "gb_per_s": cost.bytes / seconds / 1e9,
                "tflop_per_s": cost.flops / seconds / 1e12,
                "share_of_roofline": share,
                **({"suspicious": "above the ceiling"} if share > 1 else {}),
                **({"peak_gb": _peak_memory(ready[name], device)} if direction == "both" and device.type == "cuda" else {}),
            }


def bench_kernels(device: torch.device, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield the times of every op at every shape."""
    for case in op_cases():
        yield from bench_case(case, device, ceilings)
        torch.compiler.reset()
        torch.cuda.empty_cache()
