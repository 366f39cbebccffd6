import dataclasses

import pytest
import torch

from tilewright.bench import generation, training
from tilewright.bench.accounting import bench_accounting
from tilewright.bench.ceilings import Ceilings
from tilewright.bench.generation import bench_generation, generation_jobs
from tilewright.bench.memory import CONFIGURATIONS, memory_jobs, peak_row
from tilewright.bench.training import VARIANTS, bench_training, counted_flops, lost_shares, training_jobs
from tilewright.kernels import get_backend
from tilewright.model import MODELS, ModelConfig
from tilewright.model.accounting import generation as step_cost
from tilewright.model.accounting import model_flops, operations
from tilewright.train import PRESETS
from tilewright.train.profile import GROUPS

CPU = torch.device("cpu")
TINY = ModelConfig(vocab_size=300, context_length=16, d_model=16, num_layers=1, num_heads=2, d_ff=32)


@pytest.fixture
def tiny(monkeypatch):
    """A preset that takes no time."""
    config = dataclasses.replace(PRESETS["stories-cpu"], model=TINY, batch_size=4)
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(training, "LAP_SECONDS", 0.0)


def test_training_is_measured(tiny):
    speed, where = bench_training("tiny", "eager", CPU)
    assert (speed["case"], speed["variant"], speed["count"]) == ("training tiny batch 4x16", "eager", training.LAPS)
    assert speed["p20_ms"] <= speed["p50_ms"] <= speed["p80_ms"]
    assert speed["tokens_per_s"] == pytest.approx(4 * 16 / speed["p50_ms"] * 1e3)
    assert speed["formula_tflop"] * 1e12 == model_flops(operations(TINY, 4))
    # Of a CPU no peak is known, so nothing is a share of one.
    assert [speed[name] for name in ("mfu", "bound_ms", "best_mfu", "peak_gb")] == [None] * 4
    assert where["table"] == "where the time of a step goes"
    assert where["matmul"] > 0
    assert where["optimizer"] > 0
    assert sum(where[name] for name in GROUPS) == pytest.approx(1)
    assert get_backend() == "auto"


def test_a_batch_that_does_not_fit_is_halved(tiny, monkeypatch):
    tried = []

    def measure(config, case, variant):
        tried.append((config.batch_size, config.micro_batch_size, get_backend(), config.compile))
        if config.batch_size > 1:
            raise torch.cuda.OutOfMemoryError
        yield {"case": case, "variant": variant}

    monkeypatch.setattr(training, "_measure", measure)
    rows = list(bench_training("tiny", "compile", CPU))
    assert tried == [(size, None, "reference", True) for size in (4, 2, 1)]
    assert [row.get("not_measured") for row in rows] == ["more memory than there is"] * 2 + [None]
    assert [row["case"] for row in rows] == [f"training tiny batch {size}x16" for size in (4, 2, 1)]


def test_what_is_measured_where():
    on_gpu = [job.case for job in training_jobs(torch.device("cuda"))]
    assert on_gpu[0] == "training gpt2-small, eager"
    assert {f"training {name}, {variant}" for name in ("gpt2-small", "gpt2-xl") for variant in VARIANTS} <= set(on_gpu)
    assert [job.case for job in training_jobs(CPU)] == ["training stories-cpu"]
    assert len(list(generation_jobs(torch.device("cuda"), None))) == 6
    assert len(list(generation_jobs(CPU, None))) == 2
    assert len(list(memory_jobs(CPU))) == len(CONFIGURATIONS) == 6


def test_losses_and_mfu_sum_up_to_the_step():
    shares = {"matmul": 0.5, "attention": 0.2, "elementwise": 0.1, "optimizer": 0.05, "idle": 0.15}
    ideal = {"matmul": 0.3, "attention": 0.12}
    losses = lost_shares(shares, ideal)
    assert losses == pytest.approx({"matmul": 0.2, "attention": 0.08, "elementwise": 0.1, "optimizer": 0.05, "idle": 0.15})
    mfu = sum(ideal.values())
    assert mfu + sum(losses.values()) == pytest.approx(1)
    # Written out, attention is products: nobody computed it in less than no time.
    written_out = lost_shares({"matmul": 0.7, "attention": 0.0, "elementwise": 0.3}, ideal)
    assert written_out == pytest.approx({"matmul": 0.28, "attention": 0, "elementwise": 0.3})


def test_flops_are_counted_for_one_sequence():
    config = dataclasses.replace(TINY, vocab_size=384)
    assert counted_flops(config) == model_flops(operations(config, 1))
    (row,) = bench_accounting("gpt2-small")
    assert row["formula_flops"] == 3 * 349_630_365_696
    # 50,257 tokens are held as 50,304.
    assert row["padding_flops"] == 3 * 2 * 1024 * 768 * 47
    assert row["same_result"]


def test_generation_is_measured(tiny):
    for batch in (1, 3):
        (row,) = bench_generation("tiny", batch, CPU, new_tokens=8)
        assert row["case"] == f"generation tiny batch {batch}, after 8 tokens"
        assert row["tokens_per_s"] == pytest.approx(batch / row["p50_ms"] * 1e3)
        assert "share_of_datasheet" not in row


def test_generation_stands_beside_its_bounds():
    from tilewright.kernels.device import find_gpu

    cost = step_cost(MODELS["gpt2-xl"], 576, 8, "bfloat16", find_gpu("h200"))
    assert cost.tokens_per_second is not None
    shape = (cost.bytes_per_step, 8 * cost.flops_per_token, Ceilings(4.32e12, 790e12), 8)
    bounds = generation._bounds(cost.tokens_per_second, cost.tokens_per_second / 2, *shape)
    assert bounds["share_of_datasheet"] == pytest.approx(0.5)
    # Bound by bandwidth: the copy reached 90% of the datasheet's.
    assert bounds["share_of_roofline"] == pytest.approx(0.5 / 0.9)
    assert "suspicious" not in bounds
    assert "measuring error" in generation._bounds(1.0, 1.1, *shape)["suspicious"]


def test_peaks_beside_their_prediction():
    row = peak_row("a", predicted=1000, measured=1020, reserved=2000)
    assert row["error"] == pytest.approx(0.02)


@pytest.mark.gpu
def test_training_and_memory_are_measured_on_a_gpu(tiny):
    device = torch.device("cuda")
    speed, where, *_ = bench_training("tiny", "compile + kernels", device)
    assert speed["peak_gb"] > 0
    assert 0.5 < sum(share for share in where.values() if isinstance(share, float)) < 1.5
    (row,) = next(memory_jobs(device)).rows()
    assert row["measured_gb"] > 1
    (row,) = bench_generation("tiny", 2, device, new_tokens=8)
    assert row["tokens_per_s"] > 0
