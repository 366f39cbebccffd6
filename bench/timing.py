"""Comparable timings: variants run in turn, and quantiles replace means."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Times:
    """Quantiles of one variant's times in milliseconds, and the number of samples."""

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
    """Return times in ms: about 20 ms of calls on a GPU, with a cold L2 cache; `calls` calls on a CPU."""
    if device.type == "cuda":
        import triton.testing

        # do_bench clears the L2 cache before each call and times it with CUDA events.
        return triton.testing.do_bench(function, warmup=5, rep=20, return_mode="all") or []
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def time_variants(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 5,
    calls: int = 1,
    failed: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Time the variants in turn in each of `rounds` rounds, so that drift of the machine's speed affects all equally.

    Every variant is called once first, to compile. On a CPU a round has `calls` calls. A variant that fails is dropped and its
    reason stored in `failed`; without `failed` the error is raised.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}

    def collect(name: str, times: Callable[[], list[float]]) -> None:
        try:
            samples[name] += times()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            del samples[name]

    def compile_first(name: str) -> list[float]:
        variants[name]()
        return []

    for name in variants:
        collect(name, partial(compile_first, name))
    for _ in range(rounds):
        for name in [*samples]:
            collect(name, partial(sample, variants[name], device, calls))
    return {name: quantiles(values) for name, values in samples.items()}
