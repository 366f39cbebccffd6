import contextlib
import math
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tilewright.bench import jobs
from tilewright.bench.jobs import Job, TimeOver, run_job

CPU = torch.device("cpu")


def job(case, *rows, then=None):
    def measure():
        for row in rows:
            yield {"case": case, **row}
        if then is not None:
            then()

    return Job(case, measure)


def run_jobs(some, device, deadline=math.inf):
    for each in some:
        yield from run_job(each, device, deadline)


def test_rows_keep_their_order():
    rows = list(run_jobs([job("a", {"x": 1}, {"x": 2}), job("b"), job("c", {"x": 3})], CPU))
    assert rows == [{"case": "a", "x": 1}, {"case": "a", "x": 2}, {"case": "c", "x": 3}]


def test_a_failing_job_does_not_stop_the_next_one():
    def fail():
        raise RuntimeError("no such kernel")

    def fill_memory():
        raise torch.cuda.OutOfMemoryError("2 TB")

    rows = list(run_jobs([job("a", {"x": 1}, then=fail), job("b", then=fill_memory), job("c", {"x": 3})], CPU))
    assert rows == [
        {"case": "a", "x": 1},
        {"case": "a", "not_measured": "RuntimeError: no such kernel"},
        {"case": "b", "not_measured": "out of memory"},
        {"case": "c", "x": 3},
    ]


def test_keyboard_interrupt_propagates():
    def interrupt():
        raise KeyboardInterrupt

    rows = run_jobs([job("a", {"x": 1}, then=interrupt), job("b")], CPU)
    assert next(rows) == {"case": "a", "x": 1}
    with pytest.raises(KeyboardInterrupt):
        next(rows)


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock fixed at `clock.now`; alarms use the real clock."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_jobs_are_cut_off_or_skipped_at_the_deadline(clock):
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)

    def hang():
        # Handlers of `Exception` must not swallow the alarm.
        for _ in range(100):
            with contextlib.suppress(Exception):
                time.sleep(60)

    both = [job("a", {"x": 1}, then=hang), job("b", {"x": 2})]
    rows = []
    # Little time is left before the second row, and none after it.
    for row, clock.now in zip(run_jobs(both, CPU, deadline=1000), (999.9, 1000, 1000), strict=True):
        rows.append(row)
    assert rows == [
        {"case": "a", "x": 1},
        {"case": "a", "not_measured": "cut off: no time left"},
        {"case": "b", "not_measured": "no time left"},
    ]
    assert signal.getsignal(signal.SIGALRM) == handler
    # An alarm of the test's own time limit is restored.
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)


def test_an_alarm_lost_in_a_finalizer_repeats(monkeypatch):
    timers = []
    monkeypatch.setattr(signal, "setitimer", lambda _, *times: timers.append(times) or (0.0, 0.0))

    class Finalised:
        def __del__(self):
            # Python only reports exceptions raised here.
            signal.raise_signal(signal.SIGALRM)

    def lose():
        Finalised()
        assert reported == [TimeOver]
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(lost.exc_type))
    reported = []
    rows = list(run_jobs([job("a", then=lose)], CPU, deadline=time.monotonic() + 1000))
    assert rows == [{"case": "a", "not_measured": "cut off: no time left"}]
    set_up, put_out = timers
    assert set_up == (pytest.approx(1000, abs=100), jobs.RING_AGAIN_S)
    assert put_out == (0,)


def test_writing_a_row_is_not_cut_off(clock):
    handler = signal.getsignal(signal.SIGALRM)
    rows = run_jobs([job("a", {"x": 1}, {"x": 2})], CPU, deadline=1000)
    assert next(rows) == {"case": "a", "x": 1}
    assert signal.getsignal(signal.SIGALRM) == handler
    clock.now = 1001
    # The next row can arrive before the alarm.
    assert [*rows] in ([{"case": "a", "x": 2}], [{"case": "a", "not_measured": "cut off: no time left"}])


def test_without_a_deadline_there_is_no_alarm(monkeypatch):
    monkeypatch.setattr(signal, "setitimer", lambda *_: pytest.fail("an alarm was set"))
    assert len(list(run_jobs([job("a", {"x": 1})], CPU, math.inf))) == 1


def test_time_over_is_not_an_exception():
    assert not issubclass(TimeOver, Exception)


def test_jobs_have_their_own_limit():
    slow = job("a", {"x": 1}, then=lambda: time.sleep(60))
    rows = list(run_job(slow, CPU, time.monotonic() + 1000, limit_s=0.1))
    assert rows == [{"case": "a", "x": 1}, {"case": "a", "not_measured": "cut off: takes more than 0.1 s"}]
    # A longer run would not give the job more time.
    assert not any(jobs.lacks_time(row) for row in rows)
