import io
import json

import pytest
from rich.console import Console

from tilewright.bench import BenchConfig, run, run_bench
from tilewright.bench.machine import describe
from tilewright.bench.readme import BEGIN, END, replace_block
from tilewright.bench.training import bench_training
from tilewright.errors import UserError
from tilewright.train.loop import resolve_device


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_say_what_they_were_measured_on(tmp_path, monkeypatch):
    monkeypatch.setitem(run.STAGES, "tokenizer", lambda device: iter([{"case": "a", "mb_per_s": 3.5, "mfu": None}]))
    console = Console(file=io.StringIO(), width=120)
    path = run_bench(BenchConfig("tokenizer", device="cpu", out=tmp_path / "r.jsonl"), console)
    machine, row = read(path)
    assert machine["stage"] == "machine"
    assert {"date", "commit", "device", "driver", "torch", "triton"} <= machine.keys()
    assert row == {"stage": "tokenizer", "case": "a", "mb_per_s": 3.5, "mfu": None}
    assert "3.5" in console.file.getvalue()  # pyright: ignore
    with pytest.raises(UserError, match="exists already"):
        run_bench(BenchConfig("tokenizer", device="cpu", out=path), console)


def test_a_killed_bench_keeps_what_it_measured(tmp_path, monkeypatch):
    def stage(device):
        yield {"case": "first"}
        raise KeyboardInterrupt

    monkeypatch.setitem(run.STAGES, "training", stage)
    with pytest.raises(KeyboardInterrupt):
        run_bench(BenchConfig("training", device="cpu", out=tmp_path / "r.jsonl"), Console(file=io.StringIO()))
    assert read(tmp_path / "r.jsonl")[1]["case"] == "first"


@pytest.mark.parametrize("stage", ["kernels", "attention", "tests"])
def test_what_needs_a_gpu_says_that_it_was_not_measured(stage):
    assert [row["not_measured"] for row in run.STAGES[stage](resolve_device("cpu"))] == ["no NVIDIA GPU"]


def test_the_long_bench_of_the_tokenizer_is_no_part_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STAGES", {name: lambda device: iter(()) for name in run.STAGES})
    monkeypatch.setitem(run.STAGES, "tokenizer-long", lambda device: iter([{"case": "an hour"}]))
    for stage, rows in (("all", 0), ("tokenizer-long", 1)):
        path = run_bench(BenchConfig(stage, device="cpu", out=tmp_path / stage), Console(file=io.StringIO()))
        assert len(read(path)) == 1 + rows


def test_training_is_measured(monkeypatch):
    (row,) = bench_training(resolve_device("cpu"), ("stories-cpu",), steps=1, warmup_steps=0)
    assert row["variant"] == "eager"
    assert row["tokens_per_s"] > 0
    assert row["mfu"] is None


def test_the_machine_is_described():
    machine = describe(resolve_device("cpu"))
    assert machine["driver"] is None
    assert machine["cpu_threads"] >= 1


def test_the_readmes_block_is_replaced_and_nothing_else():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_block(text, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    for broken in ("nothing", f"{END} {BEGIN}", BEGIN):
        with pytest.raises(UserError, match="has no block"):
            replace_block(broken, "")
