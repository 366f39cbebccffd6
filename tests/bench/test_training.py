import dataclasses
from contextlib import nullcontext

import pytest
import torch

from tilewright.bench import generation, training
from tilewright.bench.accounting import bench_accounting
from tilewright.bench.ceilings import Ceilings
from tilewright.bench.generation import bench_generation, generation_jobs
from tilewright.bench.memory import CONFIGURATIONS, memory_jobs, peak_row
from tilewright.bench.results import final_rows
from tilewright.bench.trainers import (
    LLAMA_BLOCKS,
    OWN_POLICY,
    TORCH_POLICY,
    VARIANTS,
    Variant,
    config_for,
    counted_flops,
    random_trainer,
)
from tilewright.bench.training import Entrant, bench_training, lost_shares, training_jobs
from tilewright.kernels import get_backend
from tilewright.model import MODELS, ModelConfig, TransformerLM
from tilewright.model.accounting import generation as step_cost
from tilewright.model.accounting import model_flops, operations, training_memory
from tilewright.train import PRESETS
from tilewright.train.profile import GROUPS

CPU = torch.device("cpu")
TINY = ModelConfig(vocab_size=300, context_length=16, d_model=16, num_layers=1, num_heads=2, d_ff=32)


@pytest.fixture
def tiny(monkeypatch):
    """A preset that runs in no time."""
    config = dataclasses.replace(PRESETS["stories-cpu"], model=TINY, batch_size=4)
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(training, "LAP_SECONDS", 0.0)


def test_training_is_measured(tiny):
    speed, where = bench_training("tiny", CPU, ["eager"])
    assert (speed["case"], speed["variant"], speed["count"]) == ("training tiny batch 4x16", "eager", training.LAPS)
    assert speed["p20_ms"] <= speed["p50_ms"] <= speed["p80_ms"]
    assert speed["tokens_per_s"] == pytest.approx(4 * 16 / speed["p50_ms"] * 1e3)
    assert speed["formula_tflop"] * 1e12 == model_flops(operations(TINY, 4))
    assert speed["measured"] == "alone"
    # A CPU's peak is unknown, so these have no value.
    assert [speed[name] for name in ("mfu", "bound_ms", "best_mfu", "peak_gb")] == [None] * 4
    assert where["table"] == "time of a step by group"
    assert where["matmul"] > 0
    assert where["optimizer"] > 0
    assert sum(where[name] for name in GROUPS) == pytest.approx(1)
    assert get_backend() == "auto"


@pytest.fixture
def laps(tiny, monkeypatch):
    """Three variants without compilation, and the recorded laps; a test can make a lap fail."""
    monkeypatch.setattr(training, "VARIANTS", {name: Variant(name == "b", compiled=False) for name in "abc"})
    taken, failures = [], {}
    lap = Entrant.lap

    def recorded(self):
        batch = self.trainer.config.batch_size
        taken.append((self.variant, batch))
        error = failures.get((self.variant, batch, taken.count(taken[-1])))
        if error is not None:
            raise error
        lap(self)

    monkeypatch.setattr(Entrant, "lap", recorded)
    return taken, failures


def test_variants_run_in_turn(laps):
    taken, _ = laps
    rows = list(bench_training("tiny", CPU, "abc"))
    assert "".join(variant for variant, _ in taken) == "abc" + "abc" * training.LAPS
    speeds = [(row["variant"], row["measured"], row["count"], row.get("preliminary")) for row in rows if "p50_ms" in row]
    # Preliminary rows come first, one per variant, then the final ones.
    assert speeds[:3] == [(name, "alone", 1, True) for name in "abc"]
    assert speeds[3:] == [(name, "in turns", training.LAPS, None) for name in "abc"]
    assert [row["variant"] for row in rows if row.get("table")] == [*"abc"]
    assert [row["variant"] for row in final_rows(rows) if "p50_ms" in row] == [*"abc"]


def test_a_failing_variant_does_not_stop_the_others(laps):
    taken, failures = laps
    failures["b", 4, 3] = RuntimeError("no such kernel")
    rows = list(bench_training("tiny", CPU, "abc"))
    assert [row for row in rows if "not_measured" in row] == [
        {"case": "training tiny batch 4x16", "variant": "b", "not_measured": "RuntimeError: no such kernel"}
    ]
    final = [row["variant"] for row in rows if row.get("count") == training.LAPS]
    assert final == ["a", "c"]
    assert taken.count(("b", 4)) == 3


def test_a_variant_that_fails_to_start_does_not_stop_the_others(laps, monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Variant, "running", lambda self: fail() if self.kernels else nullcontext())
    rows = list(bench_training("tiny", CPU, "abc"))
    assert [(row["variant"], row["not_measured"]) for row in rows if "not_measured" in row] == [
        ("b", "RuntimeError: no compiler")
    ]
    assert [row["variant"] for row in rows if row.get("count") == training.LAPS] == ["a", "c"]


def test_a_variant_out_of_memory_runs_alone_at_half_the_batch(laps):
    taken, failures = laps
    failures["b", 4, 2] = torch.cuda.OutOfMemoryError()  # together with the others
    failures["b", 4, 3] = torch.cuda.OutOfMemoryError()  # alone
    rows = list(bench_training("tiny", CPU, "abc"))
    final = [row for row in rows if not row.get("table") and not row.get("preliminary")]
    batch_4, batch_2 = (f"training tiny batch {size}x16" for size in (4, 2))
    assert [(row["case"], row["variant"], row.get("measured", row.get("not_measured"))) for row in final] == [
        (batch_4, "a", "in turns"),
        (batch_4, "c", "in turns"),
        (batch_4, "b", "out of memory"),
        (batch_2, "b", "alone"),
    ]
    assert taken.count(("b", 2)) == training.LAPS


def test_variants_run_alone_if_they_do_not_fit_together(laps, monkeypatch):
    monkeypatch.setattr(training, "_free_memory", lambda device: 1.0)
    rows = list(bench_training("tiny", CPU, "abc"))
    assert "".join(variant for variant, _ in laps[0]) == "".join(name * training.LAPS for name in "abc")
    assert [row["measured"] for row in rows if "p50_ms" in row] == ["alone"] * 3


def test_fit_together(monkeypatch):
    model, batch = MODELS["gpt2-small"], 32
    own, torchs = (training_memory(model, batch, policy=policy) for policy in (OWN_POLICY, TORCH_POLICY))
    # The weights and moments of all variants, and the activations of one.
    needed = (len(VARIANTS) - 1) * (own.weights + own.optimizer_state) + torchs.peak
    for share, fits in ((0.99, False), (1.01, True)):
        monkeypatch.setattr(training, "_free_memory", lambda device, share=share: share * needed / training.USABLE_MEMORY)
        assert training.fit_together(model, batch, CPU, tuple(VARIANTS)) == fits


def test_step_variants_compute_the_same(tiny):
    losses = []
    for variant in (Variant(kernels=True, compiled=False), Variant(kernels=False, compiled=False)):
        with random_trainer(config_for("tiny", CPU, 4)) as trainer, variant.running():
            losses.append([float(trainer.train_step()["loss"]) for _ in range(2)])
        assert get_backend() == "auto"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_weights_are_initialized_like_the_model(tiny):
    with random_trainer(config_for("tiny", CPU, 4)) as trainer:
        drawn, own = trainer.model.state_dict(), TransformerLM(TINY).state_dict()
    assert drawn.keys() == own.keys()
    for name, weight in drawn.items():
        assert weight.std().item() == pytest.approx(own[name].std().item(), rel=0.3), name
    assert (drawn["ln_final.weight"] == 1).all()


def test_jobs_by_device():
    on_gpu = [job.case for job in training_jobs(torch.device("cuda"))]
    assert on_gpu == [f"training {name}" for name in ("gpt2-small", LLAMA_BLOCKS, "tinystories-17m", "gpt2-medium", "gpt2-xl")]
    assert [job.case for job in training_jobs(CPU)] == ["training stories-cpu"]
    assert len(list(generation_jobs(torch.device("cuda"), None))) == 6
    assert len(list(generation_jobs(CPU, None))) == 2
    assert len(list(memory_jobs(CPU))) == len(CONFIGURATIONS) >= 6


def test_lost_shares_and_mfu_sum_to_one():
    shares = {"matmul": 0.5, "attention": 0.2, "elementwise": 0.1, "optimizer": 0.05, "idle": 0.15}
    ideal = {"matmul": 0.3, "attention": 0.12}
    losses = lost_shares(shares, ideal)
    assert losses == pytest.approx({"matmul": 0.2, "attention": 0.08, "elementwise": 0.1, "optimizer": 0.05, "idle": 0.15})
    mfu = sum(ideal.values())
    assert mfu + sum(losses.values()) == pytest.approx(1)
    # Naive attention runs as products, so its loss is not negative.
    written_out = lost_shares({"matmul": 0.7, "attention": 0.0, "elementwise": 0.3}, ideal)
    assert written_out == pytest.approx({"matmul": 0.28, "attention": 0, "elementwise": 0.3})


def test_flops_of_one_sequence_match_the_counter():
    config = dataclasses.replace(TINY, vocab_size=384)
    assert counted_flops(config) == model_flops(operations(config, 1))
    (row,) = bench_accounting("gpt2-small")
    assert row["formula_flops"] == 3 * 349_630_365_696
    # The 50,257 tokens are padded to 50,304.
    assert row["padding_flops"] == 3 * 2 * 1024 * 768 * 47
    assert row["same_result"]


def test_generation_is_measured(tiny):
    for batch in (1, 3):
        (row,) = bench_generation("tiny", batch, CPU, new_tokens=8)
        assert row["case"] == f"generation tiny batch {batch}, after 8 tokens"
        assert row["tokens_per_s"] == pytest.approx(batch / row["p50_ms"] * 1e3)
        assert "share_of_datasheet" not in row


def test_generation_bounds():
    from tilewright.datasheet import find_gpu

    cost = step_cost(MODELS["gpt2-xl"], 576, 8, "bfloat16", find_gpu("h200"))
    assert cost.tokens_per_second is not None
    shape = (cost.bytes_per_step, 8 * cost.flops_per_token, Ceilings(4.32e12, 790e12), 8)
    bounds = generation._bounds(cost.tokens_per_second, cost.tokens_per_second / 2, *shape)
    assert bounds["share_of_datasheet"] == pytest.approx(0.5)
    # Bandwidth is the limit: the copy reached 90% of the datasheet.
    assert bounds["share_of_roofline"] == pytest.approx(0.5 / 0.9)
    assert "suspicious" not in bounds
    assert "measuring error" in generation._bounds(1.0, 1.1, *shape)["suspicious"]


def test_peak_row_has_the_prediction_error():
    row = peak_row("a", predicted=1000, measured=1020, reserved=2000)
    assert row["error"] == pytest.approx(0.02)


@pytest.mark.gpu
def test_training_and_memory_are_measured_on_a_gpu(tiny):
    device = torch.device("cuda")
    variants = ("eager", "compile + kernels")
    rows = final_rows(list(bench_training("tiny", device, variants)))
    speeds = [row for row in rows if not row.get("table")]
    assert [(row["variant"], row.get("measured")) for row in speeds] == [(variant, "in turns") for variant in variants], rows
    assert all(row["peak_gb"] > 0 for row in speeds)
    where = next(row for row in rows if row.get("table"))
    assert 0.5 < sum(share for share in where.values() if isinstance(share, float)) < 1.5
    (row,) = next(memory_jobs(device)).rows()
    assert row["measured_gb"] > 1
    (row,) = bench_generation("tiny", 2, device, new_tokens=8)
    assert row["tokens_per_s"] > 0
