import io
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from rich.console import Console
from torch.cuda._utils import _get_device_index

from tilewright.bench import BenchConfig, jobs, run, run_bench, stages
from tilewright.bench.jobs import Job
from tilewright.bench.machine import describe
from tilewright.bench.readme import BEGIN, END, replace_block
from tilewright.bench.stages import STAGES, Stage, chosen_stages, count_outcomes, failures
from tilewright.cli import main
from tilewright.errors import UserError

CPU = torch.device("cpu")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def replaced(monkeypatch):
    """The stages, each of which yields what the test says, or nothing."""
    fakes = {}

    def fake(name, *rows, then=None, cpu_s: float | None = 10.0, **rest):
        def measure():
            yield from rows
            if then is not None:
                then()

        fakes[name] = Stage(f"what {name} measures", lambda on: iter([Job(name, measure)]), 10, cpu_s, **rest)

    monkeypatch.setattr(stages, "STAGES", fakes)
    return fake


def bench(tmp_path, *names, out="r.jsonl"):
    console = Console(file=io.StringIO(), width=160)
    return run_bench(BenchConfig(names, device="cpu", out=tmp_path / out), console), console.file.getvalue()  # pyright: ignore


def test_rows_say_what_they_were_measured_on(tmp_path, replaced):
    replaced("tokenizer", {"case": "a", "mb_per_s": 3.5, "mfu": None})
    path, shown = bench(tmp_path, "tokenizer")
    machine, row = read(path)
    assert machine["stage"] == "machine"
    assert {"date", "commit", "device", "driver", "torch", "triton", "python", "cpu"} <= machine.keys()
    assert row == {"stage": "tokenizer", "case": "a", "mb_per_s": 3.5, "mfu": None}
    assert "3.5" in shown
    assert "mfu" not in shown.lower()
    with pytest.raises(UserError, match="exists already"):
        bench(tmp_path, "tokenizer")


def test_a_killed_bench_keeps_what_it_measured(tmp_path, replaced):
    def interrupt():
        # What another process would find now.
        assert [row.get("case") for row in read(tmp_path / "r.jsonl")] == [None, "first"]
        raise KeyboardInterrupt

    replaced("training", {"case": "first"}, then=interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, "training")
    assert read(tmp_path / "r.jsonl")[1]["case"] == "first"


def test_what_needs_a_gpu_says_that_it_was_not_measured(tmp_path):
    needing = [name for name, stage in STAGES.items() if stage.cpu_s is None]
    assert set(needing) >= {"machine", "ceilings", "tests", "kernels", "attention", "memory"}
    path, shown = bench(tmp_path, *needing)
    rows = read(path)[1:]
    assert [(row["stage"], row["not_measured"]) for row in rows] == [(name, "no NVIDIA GPU") for name in needing]
    assert [row["case"] for row in rows] == [STAGES[name].what for name in needing]
    assert shown.count("no NVIDIA GPU") == len(needing)


def test_a_stage_that_is_named_has_no_time_limit_and_all_stages_together_have(tmp_path, replaced, monkeypatch):
    deadlines = []

    def noted(some_jobs, device, deadline):
        deadlines.append(deadline)
        return jobs.run_jobs(some_jobs, device, deadline)

    monkeypatch.setattr(run, "run_jobs", noted)
    replaced("training", {"case": "first"}, cpu_s=100.0)
    replaced("tokenizer", {"case": "second"}, cpu_s=50.0)
    for names in (("training", "tokenizer"), ("all",)):
        start = time.monotonic()
        assert [row["case"] for row in read(bench(tmp_path, *names, out=names[0])[0])[1:]] == ["first", "second"]
    assert deadlines[:2] == [math.inf] * 2
    first, second = deadlines[2:]
    assert start + 100 <= first <= time.monotonic() + 100
    assert second - first == pytest.approx(50)


@pytest.mark.parametrize("gpu", [torch.device("cuda"), torch.device("cuda", 1)])
def test_a_run_on_a_gpu(tmp_path, replaced, monkeypatch, gpu):
    """On a GPU that is not there: what is asked of one is answered by the test."""
    states, current = [], []

    def state_row(device, when):
        states.append((device, when))
        return {"case": f"GPU {when}", "sm_mhz": 1980.0}

    monkeypatch.setattr(run, "resolve_device", lambda name: gpu)
    monkeypatch.setattr(run, "prepare_allocator", lambda device: None)
    monkeypatch.setattr(
        run, "describe", lambda device: {"device": "NVIDIA H200", "date": "2026-01-02T03:04:05+00:00", "torch": "2"}
    )
    monkeypatch.setattr(run, "Device", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(run, "state_row", state_row)
    # As PyTorch itself reads its argument: a device without a number is an error.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_get_device_index(device)))
    monkeypatch.setattr(jobs, "clean_up", lambda device: None)
    monkeypatch.setattr(jobs, "is_lost", lambda device: False)
    monkeypatch.chdir(tmp_path)
    replaced("machine", {"case": "GPU before"}, cpu_s=None)
    replaced("kernels", {"case": "a"}, cpu_s=None)
    path = run_bench(BenchConfig(("kernels",)), Console(file=io.StringIO()))
    assert path.as_posix() == "bench/results/nvidia-h200/20260102T030405.jsonl"
    assert [(row["stage"], row.get("case")) for row in read(path)] == [
        ("machine", None), ("machine", "GPU before"), ("kernels", "a"), ("machine", "GPU after kernels"),
    ]  # fmt: skip
    assert states == [(gpu, "after kernels")]
    assert current == ([] if gpu.index is None else [1])


def test_a_gpu_that_a_kernel_broke_costs_one_job(tmp_path, monkeypatch):
    turns = []

    def job(name):
        def measure():
            turns.append(name)
            yield {"case": name}

        return Job(name, measure)

    def stage(*names):
        return Stage("jobs", lambda on: map(job, names), 10, 10)

    fakes = {"kernels": stage("a", "broken", "b", "broken too", "c"), "attention": stage("d")}
    monkeypatch.setattr(run, "STAGES", fakes)
    monkeypatch.setattr(stages, "STAGES", fakes)
    monkeypatch.setattr(jobs, "is_lost", lambda device: turns[-1].startswith("broken"))
    # The new process, within this one.
    monkeypatch.setattr(run, "_in_a_new_process", lambda path, *arguments: run._go_on(str(path), *arguments))
    path, _ = bench(tmp_path, "kernels", "attention")
    assert turns == ["a", "broken", "b", "broken too", "c", "d"]
    rows = [(row["stage"], row["case"]) for row in read(path)[1:] if "not_measured" not in row]
    assert rows == [("kernels", name) for name in turns[:-1]] + [("attention", "d")]
    lost = [row["case"] for row in read(path) if "broke the GPU's context" in row.get("not_measured", "")]
    assert lost == ["broken", "broken too"]


@pytest.mark.slow
def test_a_new_process_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"stage": "machine"}\n')
    names = ["memory", "kernels"]
    begin = (
        "import math, torch; from pathlib import Path; from tilewright.bench import run; print('before');"
        f"run._in_a_new_process(Path({str(path)!r}), {names}, torch.device('cpu'), dict.fromkeys({names}, math.inf), 0)"
    )
    # From a folder whose modules are no part of it.
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, "-P", "-c", begin], cwd=tmp_path, capture_output=True, text=True, check=True)
    # What was printed before is not lost.
    assert done.stdout.startswith("before")
    assert done.stdout.replace("\n", "").endswith(f"wrote {path}")
    assert [(row["stage"], row.get("not_measured")) for row in read(path)] == [
        ("machine", None), ("memory", "no NVIDIA GPU"), ("kernels", "no NVIDIA GPU"),
    ]  # fmt: skip


def test_a_message_that_looks_like_markup_is_shown(tmp_path, replaced):
    replaced("tokenizer", {"case": "a", "not_measured": "OSError: [/usr/lib] [bold]"}, {"case": "[/b]", "variant": "[0/0]"})
    _, shown = bench(tmp_path, "tokenizer")
    assert "[/usr/lib] [bold]" in shown
    assert "[0/0]" in shown


def test_a_stage_that_cannot_begin_is_named(tmp_path, replaced):
    def fail(on):
        raise RuntimeError("no memory for the ceilings")

    replaced("tokenizer", {"case": "second"})
    stages.STAGES["kernels"] = Stage("what kernels measures", fail, 1, 1)
    kernels = read(bench(tmp_path, "all")[0])[-1]
    assert kernels["case"] == "what kernels measures"
    assert kernels["not_measured"] == "RuntimeError: no memory for the ceilings"


def test_the_time_of_all_stages():
    # Ten seconds are left to the start and to what cannot be interrupted; and 10 minutes to a CPU.
    assert sum(stage.gpu_s for stage in STAGES.values() if stage.in_all) <= 530
    assert sum(stage.cpu_s or 0 for stage in STAGES.values() if stage.in_all) <= 580


def test_stages_are_chosen_by_name():
    assert get_args(run.StageName) == ("all", *STAGES)
    assert "tokenizer-long" not in chosen_stages(["all"], is_gpu=True)
    assert list(chosen_stages(["tokenizer-long", "inspect"], is_gpu=False)) == ["inspect", "tokenizer-long"]
    assert list(chosen_stages(["attention"], is_gpu=True)) == ["machine", "ceilings", "attention"]
    assert list(chosen_stages(["attention"], is_gpu=False)) == ["attention"]
    with pytest.raises(UserError, match="stage 'kernel' is unknown: choose of all, machine"):
        BenchConfig(("kernel",))  # pyright: ignore


def test_the_command_takes_several_stages(tmp_path, replaced, capsys):
    replaced("accounting", {"case": "a"})
    replaced("inspect", *({"case": f"kernel {i}"} for i in range(run.SHOWN_ROWS + 1)))
    assert main(["bench", "inspect", "accounting", "--device", "cpu", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert len(read(tmp_path / "r.jsonl")) == run.SHOWN_ROWS + 3
    assert f"inspect: {run.SHOWN_ROWS + 1} rows, in the file only" in capsys.readouterr().out


def test_the_tests_outcomes_are_counted():
    lines = [
        "platform linux",
        "tests/a.py::test_b PASSED [ 1%]",
        "tests/a.py::test_c[x y] PASSED",
        "tests/a.py::test_d FAILED",
        "tests/a.py::test_e ERROR",
        "",
        "1 failed",
    ]
    assert count_outcomes(lines) == {"passed": 2, "failed": 1, "errors": 1, "skipped": 0}
    assert failures(lines) == "tests/a.py::test_d, tests/a.py::test_e"
    assert failures(lines[:3]) is None


@pytest.mark.parametrize(("body", "outcome"), [("assert True", "passed"), ("assert False", "FAILED")])
def test_the_gpu_marked_tests_are_run(tmp_path, monkeypatch, body, outcome):
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n@pytest.mark.gpu\ndef test_one():\n    {body}\ndef test_two():\n    pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(stages, "TESTS", tmp_path)
    (row,) = stages._tests()
    assert row["variant"] == outcome
    assert row["passed"] + row["failed"] == 1
    assert "1 deselected" in row["summary"]
    monkeypatch.setattr(stages, "TESTS", tmp_path / "none")
    assert [row["not_measured"] for row in stages._tests()] == ["installed without tests"]


def test_the_machine_is_described():
    machine = describe(CPU)
    assert machine["driver"] is None
    assert machine["cpu_threads"] >= 1


def test_the_readmes_block_is_replaced_and_nothing_else():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_block(text, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    for broken in ("nothing", f"{END} {BEGIN}", BEGIN):
        with pytest.raises(UserError, match="has no block"):
            replace_block(broken, "")
