import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tilewright.bench import BenchConfig, run, run_bench, stages, watch, worker
from tilewright.bench.jobs import Job
from tilewright.bench.stages import Stage

CPU = torch.device("cpu")


class Forked:
    """A worker forked from this process, so that it inherits the patches of the test."""

    def __init__(self, target, *others):
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            status = 1
            # Clear the alarm of the test's own time limit.
            signal.setitimer(signal.ITIMER_REAL, 0)
            with suppress(BaseException):
                os.setsid()
                for other in others:
                    other.close()
                target()
                status = 0
            os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            time.sleep(0.005)
        return self.returncode


def hang():
    """Wait with all signals blocked except SIGKILL, like a kernel that never ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*signal.Signals} - {signal.SIGKILL, signal.SIGSTOP})
    while True:
        time.sleep(60)


def die(number):
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("no such kernel")


FAULTS = {
    "hangs": hang,
    "segfaults": partial(die, signal.SIGSEGV),
    "is killed": partial(die, signal.SIGKILL),
    "exits": partial(os._exit, 3),
    "raises": fail,
    "sleeps": partial(time.sleep, 60),
}


@pytest.fixture
def fake_stages(tmp_path, monkeypatch):
    """Return a function that replaces the stages by jobs named after `FAULTS`; it returns one that lists (job, process)."""
    path = tmp_path / "ran"
    path.touch()

    def job(name):
        def measure():
            with path.open("a") as file:
                file.write(f"{name}:{os.getpid()}\n")
            yield {"case": name, "p50_ms": 1.0}
            FAULTS.get(name.split(",")[0], lambda: None)()

        return Job(name, measure)

    def make(**of_stages):
        fakes = {
            name: Stage(
                f"what {name} measures", lambda on, names=names: iter([job(each) for each in names]), 10, 10, limit_s=1.0
            )
            for name, names in of_stages.items()
        }
        for module in (stages, worker):
            monkeypatch.setattr(module, "STAGES", fakes)
        return lambda: [line.split(":") for line in path.read_text().splitlines()]

    def start(device, ends, tune, connection, left, done):
        some = {name: worker.STAGES[name] for name in left}
        return Forked(lambda: watch.report(connection, worker.run_here(some, device, ends, done, limited=True)))

    monkeypatch.setattr(worker, "_start", start)
    monkeypatch.setattr(run, "run_here", worker.run_in_workers)
    monkeypatch.setattr(watch, "GRACE_S", 0.5)
    monkeypatch.setattr(watch, "POLL_S", 0.02)
    return make


def bench(tmp_path, capsys, **rest):
    path = run_bench(BenchConfig(("all",), device="cpu", **rest), Console(width=200))
    return path, [row for row in map(json.loads, path.read_text().splitlines()) if "job" not in row], capsys.readouterr().out


def test_a_job_that_kills_its_worker_loses_only_itself(tmp_path, fake_stages, capsys):
    names = ["a", "hangs", "b", "segfaults", "is killed", "exits", "raises", "sleeps", "c"]
    ran = fake_stages(kernels=names, attention=["d"])
    path, rows, shown = bench(tmp_path, capsys, out=tmp_path / "r.jsonl")
    assert [name for name, _ in ran()] == [*names, "d"]
    # Each lost worker is replaced by a new process, and no other.
    of = dict(ran())
    workers = [{of[name] for name in group} for group in (
        ["a", "hangs"], ["b", "segfaults"], ["is killed"], ["exits"], ["raises", "sleeps", "c", "d"],
    )]  # fmt: skip
    assert [len(group) for group in workers] == [1] * 5
    assert len(set.union(*workers)) == 5
    # Earlier measurements are kept.
    assert [row["case"] for row in rows if "p50_ms" in row] == [*names, "d"]
    reasons = {row["case"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert re.fullmatch(r"hung: killed after \d+ s", reasons.pop("hangs"))
    assert reasons == {
        "segfaults": "died with signal 11 (Segmentation fault)",
        "is killed": "died with signal 9 (Killed)",
        "exits": "died with exit status 3",
        "raises": "RuntimeError: no such kernel",
        "sleeps": "cut off: takes more than 1 s",
    }
    assert "kernels: segfaults: 1 ms; died with signal 11 (Segmentation fault)" in shown
    # No job is tried again.
    bench(tmp_path, capsys, resume=path)
    assert len(ran()) == len(names) + 1


def test_a_job_that_hangs_at_the_deadline_runs_again_on_resume(tmp_path, fake_stages, capsys):
    ran = fake_stages(kernels=["a", "hangs"])
    path, rows, shown = bench(tmp_path, capsys, out=tmp_path / "r.jsonl", minutes=0.01)
    assert rows[-1]["not_measured"] == "cut off: no time left"
    assert f"continue with `tilewright bench all --minutes 0.01 --resume {path}`" in shown
    _, rows, _ = bench(tmp_path, capsys, resume=path)
    assert "hung" in rows[-1]["not_measured"]
    bench(tmp_path, capsys, resume=path)
    assert [name for name, _ in ran()] == ["a", "hangs", "hangs"]


def test_processes_of_a_lost_worker_are_killed(tmp_path, fake_stages, monkeypatch, capsys):
    def leave_one_behind():
        # In its own group, like the processes of the GPU tests.
        child = subprocess.Popen(["sleep", "600"], process_group=0)
        (tmp_path / "child").write_text(str(child.pid))
        os._exit(3)

    fake_stages(kernels=["leaves"], attention=["b"])
    monkeypatch.setitem(FAULTS, "leaves", leave_one_behind)
    _, rows, _ = bench(tmp_path, capsys, out=tmp_path / "r.jsonl")
    assert [row["case"] for row in rows if "p50_ms" in row] == ["leaves", "b"]
    # The process may still be a zombie.
    status = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not status.exists() or " Z " in status.read_text()


def test_an_incomplete_message_times_out(monkeypatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.2)
    own, its = watch._connect()
    os.write(its.fileno(), b"\0\0\1\0{")
    assert watch._received(own, None, time.monotonic() + 60) is None  # pyright: ignore


def test_a_worker_that_loses_its_gpu_in_setup_is_replaced(tmp_path, fake_stages, monkeypatch, capsys):
    fake_stages(kernels=["a"], attention=["b"])
    worker.STAGES["kernels"] = Stage("what kernels measures", lambda on: fail(), 10, 10)  # pyright: ignore
    started, start = [], worker._start
    monkeypatch.setattr(worker, "_start", lambda *arguments: started.append(1) or start(*arguments))
    monkeypatch.setattr(worker, "is_lost", lambda device: True)
    _, rows, _ = bench(tmp_path, capsys, out=tmp_path / "r.jsonl")
    assert [(row["case"], row.get("not_measured")) for row in rows[1:]] == [
        ("what kernels measures", "RuntimeError: no such kernel"), ("b", None),
    ]  # fmt: skip
    assert len(started) == 2


def test_a_worker_that_loses_its_gpu_is_replaced(tmp_path, fake_stages, monkeypatch, capsys):
    ran = fake_stages(kernels=["a", "broken", "b", "broken too"], attention=["c"])
    monkeypatch.setattr("tilewright.bench.jobs.is_lost", lambda device: ran()[-1][0].startswith("broken"))
    _, rows, _ = bench(tmp_path, capsys, out=tmp_path / "r.jsonl")
    lost = [row["case"] for row in rows if "broke the GPU's context" in row.get("not_measured", "")]
    assert lost == ["broken", "broken too"]
    assert [(row["stage"], row["case"]) for row in rows if "p50_ms" in row] == [
        ("kernels", "a"), ("kernels", "broken"), ("kernels", "b"), ("kernels", "broken too"), ("attention", "c"),
    ]  # fmt: skip
    assert len({process for _, process in ran()}) == 3


def test_a_stage_that_hangs_in_setup_is_skipped(tmp_path, fake_stages, monkeypatch, capsys):
    ran = fake_stages(kernels=["a"], attention=["b"])
    worker.STAGES["kernels"] = Stage("what kernels measures", lambda on: hang(), 10, 10)  # pyright: ignore
    monkeypatch.setattr(worker, "SETUP_S", 0.1)
    _, rows, _ = bench(tmp_path, capsys, out=tmp_path / "r.jsonl")
    assert [name for name, _ in ran()] == ["b"]
    assert [(row["case"], "hung" in row.get("not_measured", "")) for row in rows[1:]] == [
        ("what kernels measures", True), ("b", False),
    ]  # fmt: skip


def test_a_lost_gpu_ends_the_run(tmp_path, fake_stages, monkeypatch, capsys):
    ran = fake_stages(kernels=["a", "b"], attention=["c"])
    # The second worker and later ones fail.
    monkeypatch.setattr(worker, "probe", lambda device: fail() if ran() else None)
    monkeypatch.setitem(FAULTS, "a", partial(die, signal.SIGKILL))
    path, rows, _ = bench(tmp_path, capsys, out=tmp_path / "r.jsonl")
    gone = "no process can use the device any more: the last one died with exit status 1"
    assert [(row["case"], row["not_measured"]) for row in rows if "not_measured" in row] == [
        ("a", "died with signal 9 (Killed)"), ("kernels", gone), ("attention", gone),
    ]  # fmt: skip
    # Once the GPU is back, the remaining jobs run.
    monkeypatch.setattr(worker, "probe", lambda device: None)
    bench(tmp_path, capsys, resume=path)
    assert [name for name, _ in ran()] == ["a", "b", "c"]


def test_closing_a_run_kills_its_worker(fake_stages, monkeypatch):
    ran = fake_stages(kernels=["a", "hangs"])
    monkeypatch.setattr(watch, "GRACE_S", 60.0)
    monkeypatch.setattr(watch, "LEAVE_S", 0.1)
    events = worker.run_in_workers(worker.STAGES, CPU, {"kernels": time.monotonic() + 60}, frozenset())
    seen = [next(event for event in events if event.get("begin") == "hangs"), next(events)]
    assert "row" in seen[1]
    events.close()
    ((_, pid), _) = ran()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize("what", [hang, partial(time.sleep, 60)])
def test_a_worker_ends_with_its_parent(monkeypatch, what):
    monkeypatch.setattr(watch, "LEAVE_S", 0.1)
    own, its = Pipe()

    def events():
        yield {"begin": "a"}
        what()

    process = Forked(lambda: watch.report(its, events()), own)
    its.close()
    assert json.loads(own.recv_bytes()) == {"begin": "a"}
    own.close()
    assert process.wait(30) in (-signal.SIGKILL, 1)


@pytest.mark.slow
def test_the_worker_is_a_separate_process(tmp_path, monkeypatch, capfd):
    # Run in a folder whose modules would shadow the worker's imports.
    (tmp_path / "torch.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run_here", worker.run_in_workers)
    path = run_bench(BenchConfig(("memory", "accounting"), device="cpu", out=tmp_path / "r.jsonl"), Console(width=200))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"stage": "accounting", "job": None, "ended": True} in rows
    rows = [row for row in rows if "job" not in row]
    assert [(row["stage"], row.get("not_measured")) for row in rows[:2]] == [("machine", None), ("memory", "no NVIDIA GPU")]
    assert {row["stage"] for row in rows[2:]} == {"accounting"}
    assert all(row["same_result"] for row in rows[2:])
    assert capfd.readouterr().err == ""
