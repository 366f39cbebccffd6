"""Times of calls that can be compared: variants take turns, and quantiles are reported instead of means."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Quantiles of the times of one variant, in milliseconds, and how many there were."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    count: int


def quantiles(samples_ms: Sequence[float]) -> Times:
    """Return the quantiles of `samples_ms`, linearly interpolated."""
    if len(samples_ms) == 1:
        return Times(samples_ms[0], samples_ms[0], samples_ms[0], 1)
    cuts = statistics.quantiles(samples_ms, n=10, method="inclusive")
    return Times(cuts[1], cuts[4], cuts[7], len(samples_ms))


def sample(function: Callable[[], object], device: torch.device, calls: int = 1) -> list[float]:
    """Return the times of some calls in ms: 20 ms of them on a GPU, with a cold L2 cache; `calls` of them on a CPU."""
    if device.type == "cuda":
        import triton.testing

        # Clears the L2 cache before each call and times it by CUDA events.
        return triton.testing.do_bench(function, warmup=5, rep=20, return_mode="all") or []
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def time_variants(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 5, calls: int = 1
) -> dict[str, Times]:
    """Time each variant in each of `rounds` rounds, in turn, so that a drift of the machine's speed touches all alike.

    Every variant is called once beforehand, to compile. On a CPU a round is `calls` calls.
    """
    for function in variants.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            samples[name] += sample(function, device, calls)
    return {name: quantiles(values) for name, values in samples.items()}
