import io
import json
import math
import os
import time
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from rich.console import Console
from torch.cuda._utils import _get_device_index

from tilewright.bench import BenchConfig, jobs, run, run_bench, stages, worker
from tilewright.bench.jobs import Job
from tilewright.bench.machine import describe
from tilewright.bench.options import StageName, TuneConfig
from tilewright.bench.readme import BEGIN, END, replace_block
from tilewright.bench.results import open_locked
from tilewright.bench.stages import STAGES, Stage, chosen_stages
from tilewright.cli import main
from tilewright.errors import UserError

CPU = torch.device("cpu")


def read(path):
    """Return the rows of a file without job marks."""
    return [row for row in map(json.loads, path.read_text().splitlines()) if "job" not in row]


@pytest.fixture
def fake_stage(monkeypatch):
    """Replace the stages by fakes that yield the rows of the test, or nothing."""
    fakes = {}

    def fake(name, *rows, then=None, cpu_s: float | None = 10.0, **rest):
        def measure():
            yield from rows
            if then is not None:
                then()

        fakes[name] = Stage(f"what {name} measures", lambda on: iter([Job(name, measure)]), 10, cpu_s, **rest)

    monkeypatch.setattr(stages, "STAGES", fakes)
    return fake


def bench(tmp_path, *names, out="r.jsonl", **rest):
    console = Console(file=io.StringIO(), width=160)
    out = None if "resume" in rest else tmp_path / out
    return run_bench(BenchConfig(names, device="cpu", out=out, **rest), console), console.file.getvalue()  # pyright: ignore


def test_results_start_with_the_machine(tmp_path, fake_stage):
    fake_stage("tokenizer", {"case": "a", "mb_per_s": 3.5, "mfu": None})
    path, shown = bench(tmp_path, "tokenizer")
    machine, row = read(path)
    assert machine["stage"] == "machine"
    assert {"date", "commit", "device", "driver", "torch", "triton", "python", "cpu"} <= machine.keys()
    assert row == {"stage": "tokenizer", "case": "a", "mb_per_s": 3.5, "mfu": None}
    assert "3.5" in shown
    assert "mfu" not in shown.lower()
    with pytest.raises(UserError, match="exists already"):
        bench(tmp_path, "tokenizer")


def test_a_killed_bench_keeps_its_rows(tmp_path, fake_stage):
    def interrupt():
        # The file as another process would see it now.
        assert [row.get("case") for row in read(tmp_path / "r.jsonl")] == [None, "first"]
        raise KeyboardInterrupt

    fake_stage("training", {"case": "first"}, then=interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, "training")
    assert read(tmp_path / "r.jsonl")[1]["case"] == "first"


def test_gpu_stages_are_not_measured_on_a_cpu(tmp_path):
    needing = [name for name, stage in STAGES.items() if stage.cpu_s is None]
    assert set(needing) >= {"machine", "ceilings", "tests", "kernels", "attention", "memory"}
    path, shown = bench(tmp_path, *needing)
    rows = read(path)[1:]
    assert [(row["stage"], row["not_measured"]) for row in rows] == [(name, "no NVIDIA GPU") for name in needing]
    assert [row["case"] for row in rows] == [STAGES[name].what for name in needing]
    assert shown.count("no NVIDIA GPU") == len(needing)


def test_only_a_run_of_all_stages_has_deadlines(tmp_path, fake_stage, monkeypatch):
    deadlines = []

    def noted(job, device, deadline, limit_s):
        deadlines.append(deadline)
        assert limit_s == math.inf
        return jobs.run_job(job, device, deadline, limit_s)

    monkeypatch.setattr(worker, "run_job", noted)
    fake_stage("training", {"case": "first"}, cpu_s=100.0)
    fake_stage("tokenizer", {"case": "second"}, cpu_s=50.0)
    for names in (("training", "tokenizer"), ("all",)):
        start = time.monotonic()
        assert [row["case"] for row in read(bench(tmp_path, *names, out=names[0])[0])[1:]] == ["first", "second"]
    assert deadlines[:2] == [math.inf] * 2
    first, second = deadlines[2:]
    assert start + 100 <= first <= time.monotonic() + 100
    assert second - first == pytest.approx(50)
    # `minutes` is shared in the same proportions.
    bench(tmp_path, "training", "tokenizer", out="minutes", minutes=5)
    first, second = deadlines[4:]
    assert second - first == pytest.approx(100)
    assert second <= time.monotonic() + 300


@pytest.mark.parametrize("gpu", [torch.device("cuda"), torch.device("cuda", 1)])
def test_a_run_on_a_gpu(tmp_path, fake_stage, monkeypatch, gpu):
    """Emulate a run on a GPU."""
    states, current = [], []

    def state_row(device, when):
        states.append((device, when))
        return {"case": f"GPU {when}", "sm_mhz": 1980.0}

    monkeypatch.setattr(run, "resolve_device", lambda name: gpu)
    monkeypatch.setattr(worker, "prepare_allocator", lambda device: None)
    monkeypatch.setattr(worker, "probe", lambda device: None)
    # Run the worker's code in this process.
    monkeypatch.setattr(run, "run_in_workers", worker.run_here)
    monkeypatch.setattr(
        run, "describe", lambda device: {"device": "NVIDIA H200", "date": "2026-01-02T03:04:05+00:00", "torch": "2"}
    )
    monkeypatch.setattr(worker, "Device", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(worker, "state_row", state_row)
    # Parse the argument like PyTorch: a device without a number is an error.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_get_device_index(device)))
    monkeypatch.setattr(jobs, "clean_up", lambda device: None)
    monkeypatch.setattr(jobs, "is_lost", lambda device: False)
    monkeypatch.chdir(tmp_path)
    fake_stage("machine", {"case": "GPU before"}, cpu_s=None)
    fake_stage("kernels", {"case": "a"}, cpu_s=None)
    path = run_bench(BenchConfig(("kernels",)), Console(file=io.StringIO()))
    assert path.as_posix() == "bench/results/nvidia-h200/20260102T030405.jsonl"
    assert [(row["stage"], row.get("case")) for row in read(path)] == [
        ("machine", None), ("machine", "GPU before"), ("kernels", "a"), ("machine", "GPU after kernels"),
    ]  # fmt: skip
    assert states == [(gpu, "after kernels")]
    assert current == ([] if gpu.index is None else [1])


def test_each_job_prints_a_summary(tmp_path, fake_stage):
    fake_stage("kernels", {"case": "kernels forward", "variant": "torch", "p50_ms": 2.0},
             {"case": "kernels forward", "variant": "tilewright", "p50_ms": 1.5},
             {"case": "kernels", "variant": "peer", "not_measured": "not installed"})  # fmt: skip
    fake_stage("tests", {"case": "tests", "variant": "passed", "summary": "7 passed"})
    fake_stage("training", {"case": "a", "x": 1}, then=lambda: 1 / 0)
    shown = bench(tmp_path, "kernels", "tests", "training")[1]
    assert "kernels: kernels: 1.5 ms forward tilewright; 1 not measured (0 s)" in shown
    assert "tests: tests: 7 passed (0 s)" in shown
    assert "training: training: ZeroDivisionError: division by zero (0 s)" in shown


def test_a_run_out_of_time_can_be_resumed(tmp_path, fake_stage):
    begun = []

    def note(name, seconds=0.0):
        return lambda: (begun.append(name), time.sleep(seconds))

    fake_stage("accounting", {"case": "a"}, then=note("accounting"), cpu_s=10.0)
    fake_stage("training", {"case": "training", "x": 1}, then=note("training", 60), cpu_s=10.0)
    fake_stage("tokenizer", {"case": "b"}, then=note("tokenizer"), cpu_s=0.0)
    path, shown = bench(tmp_path, "all", minutes=0.02)
    assert begun == ["accounting", "training"]
    assert [row.get("not_measured") for row in read(path)[1:]] == [
        None, None, "cut off: no time left", "no time left",
    ]  # fmt: skip
    hint = f"no time left for 2 jobs: continue with `tilewright bench all --minutes 0.02 --resume {path}`"
    assert hint.replace(" ", "") in "".join(shown.split())
    fake_stage("training", {"case": "training", "x": 2}, then=note("again"), cpu_s=10.0)
    assert bench(tmp_path, "all", resume=path)[0] == path
    assert begun == ["accounting", "training", "again", "tokenizer"]
    machine, *rows = read(path)
    assert machine["stage"] == "machine"
    assert [(row["stage"], row["case"]) for row in rows] == [
        ("accounting", "a"), ("machine", "resumed"), ("training", "training"), ("tokenizer", "b"),
    ]  # fmt: skip
    assert rows[2]["x"] == 2
    assert rows[1]["commit"] == machine["commit"]
    # All jobs are done.
    bench(tmp_path, "all", resume=path)
    assert len(begun) == 4


def test_a_killed_run_resumes_with_the_interrupted_job(tmp_path, fake_stage):
    def interrupt():
        raise KeyboardInterrupt

    fake_stage("accounting", {"case": "a"})
    fake_stage("training", {"case": "first", "x": 1}, then=interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, "all")
    path = tmp_path / "r.jsonl"
    path.write_text(path.read_text() + '{"stage": "trai')
    fake_stage("training", {"case": "first", "x": 2})
    bench(tmp_path, "all", resume=path)
    assert [row.get("x") for row in read(path)[1:] if row["stage"] != "machine"] == [None, 2]


def test_a_run_resumes_only_on_the_same_machine(tmp_path, fake_stage):
    fake_stage("accounting", {"case": "a"})
    path = tmp_path / "r.jsonl"
    path.write_text('{"stage": "machine", "device": "NVIDIA H200", "torch": "2"}\n{"stage": "accounting", "job": "x"}\n')
    before = path.read_text()
    with pytest.raises(UserError, match="cannot be resumed here: its device is NVIDIA H200"):
        bench(tmp_path, "all", resume=path)
    assert path.read_text() == before
    with pytest.raises(UserError, match="omit --out"):
        BenchConfig(out=path, resume=path)
    for minutes in (0, math.nan, 1e9):
        with pytest.raises(UserError, match=r"minutes is .*: expected above 0 and at most 10,000"):
            BenchConfig(minutes=minutes)


def test_two_runs_do_not_write_to_one_file(tmp_path, fake_stage):
    fake_stage("accounting", {"case": "a"})
    path, _ = bench(tmp_path, "accounting")
    before = path.read_text()
    with open_locked(path), pytest.raises(UserError, match="belongs to a run that has not ended yet"):
        bench(tmp_path, "accounting", resume=path)
    assert path.read_text() == before


def test_files_without_job_marks_cannot_be_resumed(tmp_path, fake_stage):
    fake_stage("accounting", {"case": "a"})
    path, _ = bench(tmp_path, "accounting")
    rows = [line for line in path.read_text().splitlines(keepends=True) if '"job"' not in line]
    path.write_text("".join(rows))
    with pytest.raises(UserError, match="does not list finished jobs"):
        bench(tmp_path, "accounting", resume=path)
    assert path.read_text() == "".join(rows)


def test_markup_in_messages_is_escaped(tmp_path, fake_stage):
    fake_stage("tokenizer", {"case": "a", "not_measured": "OSError: [/usr/lib] [bold]"}, {"case": "[/b]", "variant": "[0/0]"})
    _, shown = bench(tmp_path, "tokenizer")
    assert "[/usr/lib] [bold]" in shown
    assert "[0/0]" in shown


def test_a_stage_that_fails_to_start_is_reported(tmp_path, fake_stage):
    def fail(on):
        raise RuntimeError("no memory for the ceilings")

    fake_stage("tokenizer", {"case": "second"})
    stages.STAGES["kernels"] = Stage("what kernels measures", fail, 1, 1)
    kernels = read(bench(tmp_path, "all")[0])[-1]
    assert kernels["case"] == "what kernels measures"
    assert kernels["not_measured"] == "RuntimeError: no memory for the ceilings"


def test_all_stages_fit_in_their_time():
    # Ten seconds remain for the start and for work that cannot be interrupted. A CPU run takes 10 minutes.
    assert sum(stage.gpu_s for stage in STAGES.values() if stage.in_all) <= 530
    assert sum(stage.cpu_s or 0 for stage in STAGES.values() if stage.in_all) <= 580


def test_starting_time_is_not_charged_to_the_first_stage():
    chosen = {name: STAGES[name] for name in ("machine", "ceilings")}
    now = time.monotonic()
    ends = run._ends(chosen, True, 30.0)
    assert ends["machine"] - now == pytest.approx(run.STARTING_S + 5, abs=1)
    assert ends["ceilings"] - ends["machine"] == pytest.approx(15)


def test_stages_are_chosen_by_name():
    assert get_args(StageName) == ("all", *STAGES)
    assert "tokenizer-long" not in chosen_stages(["all"], is_gpu=True)
    assert list(chosen_stages(["tokenizer-long", "inspect"], is_gpu=False)) == ["inspect", "tokenizer-long"]
    assert list(chosen_stages(["attention"], is_gpu=True)) == ["machine", "ceilings", "attention"]
    assert list(chosen_stages(["attention"], is_gpu=False)) == ["attention"]
    with pytest.raises(UserError, match="stage 'kernel' is unknown: expected one of all, machine"):
        BenchConfig(("kernel",))  # pyright: ignore


def test_the_command_takes_several_stages(tmp_path, fake_stage, capsys):
    fake_stage("accounting", {"case": "a"})
    fake_stage("inspect", *({"case": f"kernel {i}"} for i in range(run.SHOWN_ROWS + 1)))
    assert main(["bench", "inspect", "accounting", "--device", "cpu", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert len(read(tmp_path / "r.jsonl")) == run.SHOWN_ROWS + 3
    assert f"inspect: {run.SHOWN_ROWS + 1} rows, in the file only" in capsys.readouterr().out


def test_the_machine_is_described():
    machine = describe(CPU)
    assert machine["driver"] is None
    assert machine["cpu_threads"] >= 1


def test_only_the_readmes_block_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_block(text, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    for broken in ("nothing", f"{END} {BEGIN}", BEGIN):
        with pytest.raises(UserError, match="has no block"):
            replace_block(broken, "")


def test_a_candidate_that_hangs_costs_minutes_and_not_the_tuning(monkeypatch):
    for cores, seconds in ((1, 1200), (2, 600), (16, 150), (64, 150)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert stages.tune_stage(TuneConfig("attention")).limit_s == seconds
