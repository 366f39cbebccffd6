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


def test_rows_come_in_their_order():
    rows = list(run_jobs([job("a", {"x": 1}, {"x": 2}), job("b"), job("c", {"x": 3})], CPU))
    assert rows == [{"case": "a", "x": 1}, {"case": "a", "x": 2}, {"case": "c", "x": 3}]


def test_a_failing_job_says_so_and_the_next_one_runs():
    def fail():
        raise RuntimeError("no such kernel")

    def fill_memory():
        raise torch.cuda.OutOfMemoryError("2 TB")

    rows = list(run_jobs([job("a", {"x": 1}, then=fail), job("b", then=fill_memory), job("c", {"x": 3})], CPU))
    assert rows == [
        {"case": "a", "x": 1},
        {"case": "a", "not_measured": "RuntimeError: no such kernel"},
        {"case": "b", "not_measured": "more memory than there is"},
        {"case": "c", "x": 3},
    ]


def test_an_interruption_goes_through():
    def interrupt():
        raise KeyboardInterrupt

    rows = run_jobs([job("a", {"x": 1}, then=interrupt), job("b")], CPU)
    assert next(rows) == {"case": "a", "x": 1}
    with pytest.raises(KeyboardInterrupt):
        next(rows)


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that stands at `clock.now`; alarms go by the real one."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_job_is_cut_off_at_the_deadline_and_later_ones_are_named(clock):
    handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)

    def hang():
        # What takes an Exception for a peer's failure does not swallow the alarm.
        for _ in range(100):
            with contextlib.suppress(Exception):
                time.sleep(60)

    both = [job("a", {"x": 1}, then=hang), job("b", {"x": 2})]
    rows = []
    # Before the second row there is little time left, and after it none.
    for row, clock.now in zip(run_jobs(both, CPU, deadline=1000), (999.9, 1000, 1000), strict=True):
        rows.append(row)
    assert rows == [
        {"case": "a", "x": 1},
        {"case": "a", "not_measured": "cut off: no time left for it"},
        {"case": "b", "not_measured": "no time left for it"},
    ]
    assert signal.getsignal(signal.SIGALRM) == handler
    # The test's own time limit, where it is an alarm, goes on.
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)


def test_an_alarm_that_is_lost_in_a_finaliser_rings_again(monkeypatch):
    timers = []
    monkeypatch.setattr(signal, "setitimer", lambda _, *times: timers.append(times) or (0.0, 0.0))

    class Finalised:
        def __del__(self):
            # Of what is raised here Python only tells.
            signal.raise_signal(signal.SIGALRM)

    def lose():
        Finalised()
        assert told == [TimeOver]
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(lost.exc_type))
    told = []
    rows = list(run_jobs([job("a", then=lose)], CPU, deadline=time.monotonic() + 1000))
    assert rows == [{"case": "a", "not_measured": "cut off: no time left for it"}]
    set_up, put_out = timers
    assert set_up == (pytest.approx(1000, abs=100), jobs.RING_AGAIN_S)
    assert put_out == (0,)


def test_a_row_that_is_being_written_is_not_cut_off(clock):
    handler = signal.getsignal(signal.SIGALRM)
    rows = run_jobs([job("a", {"x": 1}, {"x": 2})], CPU, deadline=1000)
    assert next(rows) == {"case": "a", "x": 1}
    assert signal.getsignal(signal.SIGALRM) == handler
    clock.now = 1001
    # The next may be there before the alarm rings.
    assert [*rows] in ([{"case": "a", "x": 2}], [{"case": "a", "not_measured": "cut off: no time left for it"}])


def test_without_a_deadline_there_is_no_alarm(monkeypatch):
    monkeypatch.setattr(signal, "setitimer", lambda *_: pytest.fail("an alarm was set"))
    assert len(list(run_jobs([job("a", {"x": 1})], CPU, math.inf))) == 1


def test_the_alarm_is_no_exception():
    assert not issubclass(TimeOver, Exception)


def test_a_job_has_a_limit_of_its_own():
    slow = job("a", {"x": 1}, then=lambda: time.sleep(60))
    rows = list(run_job(slow, CPU, time.monotonic() + 1000, limit_s=0.1))
    assert rows == [{"case": "a", "x": 1}, {"case": "a", "not_measured": "cut off: takes more than 0.1 s"}]
    # Another run would not have more time for it.
    assert not any(jobs.lacks_time(row) for row in rows)
