"""The bench's work in pieces: a job yields rows; one that fails, or for which no time is left, says so in a row."""

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
    """One thing to measure, named as its rows are, so that it can be named where it is left out."""

    case: str
    rows: Callable[[], Rows]


NO_TIME = "no time left for it"
CUT_OFF = "cut off: no time left for it"
# An exception that rings in a finaliser is lost, so it rings again; not before what is cut off has cleaned up.
RING_AGAIN_S = 5.0


class TimeOver(BaseException):
    """The time of a stage is over: no Exception, so that nobody takes it for the failure of a peer."""


@contextmanager
def _alarm(deadline: float) -> Iterator[None]:
    """Raise `TimeOver` in the block at `deadline` (of time.monotonic), as soon as Python runs there again."""
    # Python runs handlers of signals in its main thread only.
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
        # It must not ring in here.
        is_over = True
        # Someone else's alarm, such as a test's time limit, goes on.
        rest = max(1e-3, before - (time.monotonic() - start)) if before else 0
        signal.setitimer(signal.ITIMER_REAL, rest)
        signal.signal(signal.SIGALRM, handler)


class DeviceLost(Exception):
    """A kernel has broken the GPU's context: nothing runs there any more in this process."""


def ask(device: torch.device) -> None:
    """Have a GPU do something; raise where it does not, but for want of memory, which others may hold."""
    if device.type == "cuda":
        with suppress(torch.cuda.OutOfMemoryError):
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()


def is_lost(device: torch.device) -> bool:
    """Return whether a GPU no longer does what this process asks of it, as after an illegal memory access."""
    try:
        ask(device)
    except RuntimeError:
        return True
    return False


def clean_up(device: torch.device) -> None:
    """Forget what was compiled, and give memory back, so that nothing of a job is left to the next."""
    if device.type == "cuda":
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def lacks_time(row: Row) -> bool:
    """Return whether a row says that the time was over, so that another run may measure what it names."""
    return row.get("not_measured") in (NO_TIME, CUT_OFF)


def run_job(job: Job, device: torch.device, deadline: float = math.inf, limit_s: float = math.inf) -> Rows:
    """Yield the rows of a job, and one if it fails, is cut off at `deadline` or its own limit, or would begin after `deadline`.

    After one that takes the GPU's context with it, `DeviceLost` is raised.
    """
    row = {"case": job.case}
    if time.monotonic() >= deadline:
        yield row | {"not_measured": NO_TIME}
        return
    ends = min(deadline, time.monotonic() + limit_s)
    rows = job.rows()
    try:
        while True:
            # Only while it is measured: a row is written in peace.
            with _alarm(ends):
                found = next(rows, None)
            if found is None:
                break
            yield found
    except TimeOver:
        yield row | {"not_measured": CUT_OFF if ends == deadline else f"cut off: takes more than {limit_s:g} s"}
    except torch.cuda.OutOfMemoryError:
        yield row | {"not_measured": "more memory than there is"}
    except Exception as error:  # one job's failure is a result, and not the end of the bench
        yield row | {"not_measured": f"{type(error).__name__}: {error}"[:300]}
    finally:
        # What a kernel did may show only now. The generator's frames may hold tensors.
        del rows
        lost = is_lost(device)
        if not lost:
            clean_up(device)
    if lost:
        yield row | {"not_measured": "broke the GPU's context: what comes next is measured by a new process"}
        raise DeviceLost
