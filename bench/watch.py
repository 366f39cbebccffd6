"""Jobs in a process of their own, a worker, which is killed where a job hangs, and replaced where it dies."""

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
"""What a run tells as it goes, always with its "stage": that a job begins ("begin" and "until", of time.monotonic), a "row" of
results, that a job has had its turn ("end"), that a stage is "over". A beginning that is "quiet" is that of no job, but of what
may hang as well; of one that is "last" the stage's time is over before its own limit. "lost", without a stage, is the last word
of a worker that the GPU is lost to."""
Events = Generator[Event, None, None]
Had = frozenset[tuple[str, str | None]]
"""(stage, case) of the jobs that are not to be run again; (stage, None) where that is all of them."""

# An alarm cuts off what comes back to Python. What has not done so long after it never will: a wait for a kernel that hangs.
GRACE_S = 20.0
# Until PyTorch is imported and the GPU has answered.
START_S = 120.0
# A worker whose parent has ended may stop what it started before it is killed.
LEAVE_S = 5.0
POLL_S = 0.5
FAILED_STARTS = 2


class Worker(Protocol):
    """A process, as `subprocess.Popen` describes it; it leads a session of its own."""

    pid: int
    returncode: Any

    def poll(self) -> Any:
        """Return the exit status, None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for its end; `subprocess.TimeoutExpired` where it does not come."""
        ...


Start = Callable[[Connection, Sequence[str], Had], Worker]
"""Starts a worker that sends its events by `report`, of these stages without the jobs that had their turn."""


def left_out(stage: str, case: str, reason: str) -> Events:
    """Yield the events of a stage that cannot be measured now."""
    yield {"stage": stage, "begin": case}
    yield {"stage": stage, "row": {"case": case, "not_measured": reason}}
    yield {"stage": stage, "over": True, "complete": False}


def report(connection: Connection, events: Iterable[Event]) -> None:
    """Send events to the parent process; where that has ended, end this process and its group."""
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        for event in events:
            connection.send_bytes(json.dumps(event).encode())


def _end_with_parent(connection: Connection) -> None:
    with suppress(OSError, EOFError):
        connection.recv_bytes()
    # As Ctrl+C does, so that a job stops the processes that it started. Only in the main thread it interrupts what waits there.
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
    """Kill a worker and what it has left behind: all processes of its session."""
    for name in os.listdir("/proc"):
        with suppress(ProcessLookupError, PermissionError):
            if name.isdigit() and os.getsid(int(name)) == worker.pid:
                os.kill(int(name), signal.SIGKILL)
    # Of a driver in trouble it may never come back; the next worker will tell.
    with suppress(subprocess.TimeoutExpired):
        worker.wait(GRACE_S)


def _received(connection: Connection, worker: Worker, until: float) -> Event | None:
    """Return the next event, None where the worker has died; `TimeoutError` where none comes before `until`."""
    while not connection.poll(POLL_S):
        if time.monotonic() > until:
            raise TimeoutError
        # A process that it left behind may hold the connection.
        if worker.poll() is not None and not connection.poll(0):
            return None
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None


def _dismiss(connection: Connection, worker: Worker) -> None:
    """Let a worker that is no longer needed end, and what it may have left behind with it."""
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(2 * LEAVE_S)
    _kill(worker)


def _connect() -> tuple[Connection, Connection]:
    own, its = Pipe()
    # Of a worker that dies in the middle of a message the rest never comes.
    with socket.socket(fileno=os.dup(own.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(GRACE_S), int(GRACE_S % 1 * 1e6)))
    return own, its


def watched(start: Start, stages: Sequence[str], had: Had = frozenset()) -> Events:
    """Yield the events of the stages, as workers tell them one after the other; a job that costs its worker has a row for it.

    That is one that does not end in time, that kills its process, or that breaks the GPU's context. It is not tried again.
    Where no worker gets as far as to begin anything, the stages that are left are left out.
    """
    left, turns, failed_starts = [*stages], {*had}, 0
    cut_off: set[str] = set()
    while left:
        own, its = _connect()
        worker = start(its, left, frozenset(turns))
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
                        turns.add((event["stage"], event["begin"]))
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
                yield from left_out(stage, stage, f"no process can use the device any more: the last one {reason}")
            return
        if reason is not None and begun is not None:
            stage, case = begun["stage"], begun["begin"]
            if begun.get("quiet"):
                turns.add((stage, case))
                yield {"stage": stage, "begin": case}
            yield {"stage": stage, "row": {"case": case, "not_measured": reason}}
            if reason == CUT_OFF:
                cut_off.add(stage)
            else:
                yield {"stage": stage, "end": case}
