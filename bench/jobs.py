"""Jobs of the bench: each yields rows; a job that fails or has no time left yields a row with the reason."""

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
Rows = Iterator[Row]


@dataclass(frozen=True)
class Job:
    """One measurement; `case` also names it when it is skipped."""

    case: str
    rows: Callable[[], Rows]


NO_TIME = "no time left"
CUT_OFF = "cut off: no time left"
# Python drops an exception raised in a finalizer, so the alarm repeats; the interval leaves time to clean up.
RING_AGAIN_S = 5.0


class TimeOver(BaseException):
    """The time of a stage is over. Not an `Exception`, so that no handler takes it for the failure of a peer."""


@contextmanager
def _alarm(deadline: float) -> Iterator[None]:
    """Raise `TimeOver` in the block at `deadline` (of time.monotonic), as soon as Python code runs there again."""
    # Python runs signal handlers only in the main thread.
    if math.isinf(deadline) or threading.current_thread() is not threading.main_thread():
        yield
        return

    is_over = False

    def ring(*_: object) -> None:
        if not is_over:
            raise TimeOver

    handler = signal.signal(signal.SIGALRM, ring)
    start, before = time.monotonic(), 0.0
    try:
        before, _ = signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - start), RING_AGAIN_S)
        yield
    finally:
        # Disarm the handler first: it must not raise in here.
        is_over = True
        # Restore an outer alarm, such as a test's time limit.
        rest = max(1e-3, before - (time.monotonic() - start)) if before else 0
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, handler)


class DeviceLost(Exception):
    """A kernel broke the GPU's context: the process cannot use the GPU any more."""


def probe(device: torch.device) -> None:
    """Run something on a GPU; raise if it fails, except for a lack of memory, which other processes can cause."""
    if device.type == "cuda":
        with suppress(torch.cuda.OutOfMemoryError):
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()


def is_lost(device: torch.device) -> bool:
    """Return whether the GPU fails for this process, as after an illegal memory access."""
    try:
        probe(device)
    except RuntimeError:
        return True
    return False


def clean_up(device: torch.device) -> None:
    """Reset compiled code and free cached memory between jobs."""
    if device.type == "cuda":
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def lacks_time(row: Row) -> bool:
    """Return whether a row was skipped for lack of time, so that another run can measure it."""
    return row.get("not_measured") in (NO_TIME, CUT_OFF)


def run_job(job: Job, device: torch.device, deadline: float = math.inf, limit_s: float = math.inf) -> Rows:
    """Yield the rows of a job, and one with the reason if it fails, is cut off, or would start after `deadline`.

    Raises `DeviceLost` after a job that broke the GPU's context.
    """
    row = {"case": job.case}
    if time.monotonic() >= deadline:
        yield row | {"not_measured": NO_TIME}
        return
    ends = min(deadline, time.monotonic() + limit_s)
    rows = job.rows()
    try:
        while True:
            # The alarm is off while a row is written.
            with _alarm(ends):
                found = next(rows, None)
            if found is None:
                break
            yield found
    except TimeOver:
        yield row | {"not_measured": CUT_OFF if ends == deadline else f"cut off: takes more than {limit_s:g} s"}
    except torch.cuda.OutOfMemoryError:
        yield row | {"not_measured": "out of memory"}
    except Exception as error:  # the failure of one job does not end the bench
        yield row | {"not_measured": f"{type(error).__name__}: {error}"[:300]}
    finally:
        # An asynchronous error can appear only now. Drop the generator first: its frames can hold tensors.
        del rows
        lost = is_lost(device)
        if not lost:
            clean_up(device)
    if lost:
        yield row | {"not_measured": "broke the GPU's context: a new process measures the rest"}
        raise DeviceLost
