import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tilewright.bench import harness
from tilewright.bench.harness import Clock, measure

ROOT = Path(__file__).parent.parent.parent


def test_the_clock_shows_what_it_was_told():
    clock = Clock()
    start = clock()
    clock.advance(0.25)
    assert (clock() - start, clock() - clock()) == (0.25, 0)


def test_the_times_of_the_bench_become_those_of_the_benchmark(monkeypatch):
    samples = iter([[1.0, 2.0], [3.0], [4.0], [5.0], [6.0]])
    calls, rounds_s = [], []

    def pedantic(target, rounds):
        for _ in range(rounds):
            start = harness.CLOCK()
            target()
            rounds_s.append(harness.CLOCK() - start)

    benchmark = SimpleNamespace(pedantic=pedantic, extra_info={})
    monkeypatch.setattr(harness, "sample", lambda call, device: next(samples))
    measure(benchmark, lambda: calls.append(1), torch.device("cpu"))
    # Called once to compile: pytest-benchmark itself never calls it.
    assert calls == [1]
    assert rounds_s == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3])
    assert benchmark.extra_info == {"device": "CPU"}


def test_every_op_and_peer_is_measured_or_skipped_with_a_reason(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--benchmark-json={tmp_path / 'b.json'}",
    ]
    # Not as a worker of the tests that run now, for which pytest-benchmark is off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert outcome.returncode == 0, outcome.stdout[-2000:]
    found = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    groups = {one["group"] for one in found}
    if not torch.cuda.is_available():
        assert {
            "rms_norm rows 6 width 96 forward",
            "linear_cross_entropy rows 6 D16 V100 both",
            "attention B1 H4 Hkv2 T24 S24 K16 both",
        } <= groups
        assert "skipped" in outcome.stdout
    assert all(one["stats"]["rounds"] >= harness.ROUNDS for one in found)
    measured = {(one["group"], one["params"].get("variant") or one["params"].get("peer")) for one in found}
    assert {(group, "tilewright") for group in groups} <= measured
