import signal
import sys
import time

import pytest
import torch

from tilewright.bench import real_run
from tilewright.bench.real_run import measure_run, rows_of, run_jobs, run_until
from tilewright.train import PRESETS

METRICS = [
    {"step": 10, "loss": 5.0, "tokens": 1000, "tokens_per_second": 90.0, "mfu": 0.1},
    {"step": 20, "loss": 4.0, "tokens": 2000, "tokens_per_second": 110.0, "mfu": 0.3, "valid_loss": 4.1},
    {"step": 30, "loss": 3.5, "tokens": 3000, "tokens_per_second": 100.0, "mfu": 0.2},
]  # fmt: skip


def test_a_run_is_summarized():
    summary, point = rows_of(METRICS, 60.0)
    expected = {
        "step": 30,
        "tokens": 3000,
        "whole_run_s": 60.0,
        "tokens_per_s": 100.0,
        "mfu": 0.2,
        "loss": 3.5,
        "valid_loss": 4.1,
    }
    assert {name: summary[name] for name in expected} == expected
    assert (point["table"], point["step"], point["loss"], point["valid_loss"]) == ("loss curve", 20, 4.0, 4.1)
    # A CPU has no MFU, and a short run no validation.
    (summary,) = rows_of([{**METRICS[0], "mfu": None}], 60.0)
    assert summary["mfu"] is summary["valid_loss"] is None
    with pytest.raises(RuntimeError, match="before its first metrics"):
        list(rows_of([], 1.0))


def program(code):
    return [sys.executable, "-c", code]


def test_a_run_stops_at_its_time_limit():
    assert run_until(program("pass"), 60.0) < 60
    stopped = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(60)"
    assert 1 < run_until(program(stopped), 2.0) < 50
    with pytest.raises(RuntimeError, match="the run ended with exit status 3"):
        run_until(program("exit(3)"), 60.0)


def test_an_interruption_ends_the_run():
    def interrupt(*_):
        raise KeyboardInterrupt

    before, start = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            run_until(program("import time; time.sleep(60)"), 60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30


def test_a_real_run_is_measured(monkeypatch):
    monkeypatch.setattr(real_run, "PRESET", "stories-cpu")
    monkeypatch.setattr(real_run, "MEGABYTES", 0.2)
    monkeypatch.setattr(real_run, "VALID_MEGABYTES", 0.02)
    model = "--model.context-length 32 --model.d-model 32 --model.num-layers 1 --model.num-heads 2 --model.d-ff 64"
    steps = "--steps 4 --batch-size 4 --log-every 2 --eval-every 2 --eval-sequences 4 --optimizer.warmup-steps 1"
    monkeypatch.setattr(real_run, "OPTIONS", tuple(f"{model} {steps} --compile False --device cpu".split()))
    summary, *points = measure_run()
    assert (summary["case"], summary["step"], summary["tokens"]) == ("run stories-cpu", 4, 4 * 4 * 32)
    assert [point["step"] for point in points] == [2, 4]
    assert points[-1]["valid_loss"] == summary["valid_loss"] > 0


def test_the_run_is_one_job_and_ends_at_the_tokens_of_the_course():
    (job,) = run_jobs(torch.device("cuda"))
    assert job.case == "run tinystories-17m"
    config = PRESETS["tinystories-17m"]
    assert config.steps * config.tokens_per_step == 327_680_000
