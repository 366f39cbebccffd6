"""Run jobs in a worker process, which is killed if a job hangs and replaced if it dies."""

import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

from .jobs import CUT_OFF

Event = dict[str, Any]
"""A message of a run, with its "stage": the start of a job ("begin", "until" of time.monotonic), a "row" of results, the end
of a job ("end"), or the end of a stage ("over"). A "quiet" beginning belongs to no job, but to work that can hang too. If it is
"last", the stage's time ends before the limit of the job. "lost", without a stage, is the last message of a worker whose GPU
context is broken."""
Events = Generator[Event, None, None]
DoneJobs = frozenset[tuple[str, str | None]]
"""(stage, case) of the jobs that are done; (stage, None) if all jobs of the stage are."""

# The alarm interrupts Python code. A job that is still running this long after it hangs, for example in a kernel.
GRACE_S = 20.0
# Time to import PyTorch and to get a first answer from the GPU.
START_S = 120.0
# A worker whose parent has ended has this long to stop its own processes before it is killed.
LEAVE_S = 5.0
POLL_S = 0.5
FAILED_STARTS = 2


class Worker(Protocol):
    """A process with the interface of `subprocess.Popen`; it leads its own session."""

    pid: int
    returncode: Any

    def poll(self) -> Any:
        """Return the exit status, None while the process runs."""
        ...

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the end of the process; raise `subprocess.TimeoutExpired` after `timeout` seconds."""
        ...


Start = Callable[[Connection, Sequence[str], DoneJobs], Worker]
"""Starts a worker for these stages, without the finished jobs, that sends its events by `report`."""


def skipped_stage(stage: str, case: str, reason: str) -> Events:
    """Yield the events of a stage that cannot be measured now."""
    yield {"stage": stage, "begin": case}
    yield {"stage": stage, "row": {"case": case, "not_measured": reason}}
    yield {"stage": stage, "over": True, "complete": False}


def report(connection: Connection, events: Iterable[Event]) -> None:
    """Send events to the parent process; when the parent ends, end this process and its group."""
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        for event in events:
            connection.send_bytes(json.dumps(event).encode())


def _end_with_parent(connection: Connection) -> None:
    with suppress(OSError, EOFError):
        connection.recv_bytes()
    # Interrupt like Ctrl+C, so that a job stops its own processes. Only the main thread can be interrupted while it waits.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(LEAVE_S)
    os.killpg(0, signal.SIGKILL)


def _ending(worker: Worker) -> str:
    with suppress(subprocess.TimeoutExpired):
        worker.wait(GRACE_S)
    if worker.returncode is None:
        _kill(worker)
        return "died, and its process did not end"
    if worker.returncode < 0:
        return f"died with signal {-worker.returncode} ({signal.strsignal(-worker.returncode)})"
    return f"died with exit status {worker.returncode}"


def _kill(worker: Worker) -> None:
    """Kill all processes in the session of a worker."""
    for name in os.listdir("/proc"):
        with suppress(ProcessLookupError, PermissionError):
            if name.isdigit() and os.getsid(int(name)) == worker.pid:
                os.kill(int(name), signal.SIGKILL)
    # With a failing driver the process may never end; the next worker shows whether the GPU works.
    with suppress(subprocess.TimeoutExpired):
        worker.wait(GRACE_S)


def _received(connection: Connection, worker: Worker, until: float) -> Event | None:
    """Return the next event, or None if the worker has died; raise `TimeoutError` after `until`."""
    while not connection.poll(POLL_S):
        if time.monotonic() > until:
            raise TimeoutError
        # Another process of the worker can keep the connection open.
        if worker.poll() is not None and not connection.poll(0):
            return None
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None


def _dismiss(connection: Connection, worker: Worker) -> None:
    """Wait for a worker to end, then kill what remains of its session."""
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(2 * LEAVE_S)
    _kill(worker)


def _connect() -> tuple[Connection, Connection]:
    own, its = Pipe()
    # Time out when a worker dies in the middle of a message.
    with socket.socket(fileno=os.dup(own.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(GRACE_S), int(GRACE_S % 1 * 1e6)))
    return own, its


def watched(start: Start, stages: Sequence[str], done: DoneJobs = frozenset()) -> Events:
    """Yield the events of the stages from one worker after the other; a job that ends its worker yields a row with the reason.

    Such a job hangs, kills its process, or breaks the GPU's context, and is not retried. If no worker gets to start a job, the
    remaining stages are skipped.
    """
    left, done_jobs, failed_starts = [*stages], {*done}, 0
    cut_off: set[str] = set()
    while left:
        own, its = _connect()
        worker = start(its, left, frozenset(done_jobs))
        its.close()
        begun: Event | None = None
        began, until, has_begun, reason = time.monotonic(), time.monotonic() + START_S, False, None
        try:
            while reason is None:
                try:
                    event = _received(own, worker, until + GRACE_S)
                except TimeoutError:
                    _kill(worker)
                    is_last = begun is not None and begun.get("last")
                    reason = CUT_OFF if is_last else f"hung: killed after {time.monotonic() - began:.0f} s"
                    break
                if event is None:
                    reason = _ending(worker)
                elif "lost" in event:
                    begun, reason = None, _ending(worker)
                elif "begin" in event:
                    begun, has_begun, began = event, True, time.monotonic()
                    until = event.get("until", began + START_S)
                    if not event.get("quiet"):
                        done_jobs.add((event["stage"], event["begin"]))
                        yield event
                else:
                    yield event | {"complete": False} if event.get("complete") and event["stage"] in cut_off else event
                    if "end" in event or "over" in event:
                        begun, until = None, time.monotonic() + START_S
                    if "over" in event:
                        left.remove(event["stage"])
                        reason = None if left else _ending(worker)
        finally:
            _dismiss(own, worker)
        failed_starts = 0 if has_begun else failed_starts + 1
        if failed_starts == FAILED_STARTS:
            for stage in left:
                yield from skipped_stage(stage, stage, f"no process can use the device any more: the last one {reason}")
            return
        if reason is not None and begun is not None:
            stage, case = begun["stage"], begun["begin"]
            if begun.get("quiet"):
                done_jobs.add((stage, case))
                yield {"stage": stage, "begin": case}
            yield {"stage": stage, "row": {"case": case, "not_measured": reason}}
            if reason == CUT_OFF:
                cut_off.add(stage)
            else:
                yield {"stage": stage, "end": case}
