"""What `pytest bench/` needs so that pytest-benchmark keeps the bench's own times: those of CUDA events on a GPU."""

from collections.abc import Callable
from itertools import chain

import torch

from .timing import sample

ROUNDS = 5


class Clock:
    """A timer for pytest-benchmark that shows what it was told: it moves by the next of `samples` while a round runs."""

    # As pytest-benchmark names it in its files.
    __name__ = "cuda events or perf_counter"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return its time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


CLOCK = Clock()


def measure(benchmark, call: Callable[[], object], device: torch.device) -> None:
    """Time `call` as the bench does and hand every time to pytest-benchmark, whose timer must be `CLOCK`.

    pytest-benchmark alone would time how long the CPU takes to launch kernels.
    """
    call()
    samples = list(chain.from_iterable(sample(call, device) for _ in range(ROUNDS)))
    times = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(times) * 1e-3), rounds=len(samples))
    benchmark.extra_info["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def here() -> torch.device:
    """Return the device that is measured: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
