from pathlib import Path

import pytest

from tilewright.bench.loop_model import CALIBRATION
from tilewright.bench.predictions import attention_predictions, bandwidth_predictions, fitted_factors
from tilewright.bench.report import render
from tilewright.bench.results import Run

OP = "rms_norm rows 65536 width 4096"
SHAPES = ("attention K64", "attention K128")


def run(date, rows, device="NVIDIA H200"):
    return Run(Path("results") / f"{date}.jsonl", {"stage": "machine", "device": device, "date": date}, tuple(rows))


def predicted():
    """The model's rows: attention at 1 ms forward and 2 ms backward, and an op with two kernels backward."""
    for shape in SHAPES:
        for direction, ms in (("forward", 1.0), ("backward", 2.0), ("both", 3.0)):
            yield {"stage": "model", "table": "predicted", "case": f"{shape} {direction}", "variant": "portable",
                   "predicted_ms": ms, "predicted_tflop_per_s": 500.0}  # fmt: skip
    for kernel, share in (("rms_norm_forward", 1.0), ("rms_norm_backward", 0.9), ("rms_norm_backward", 0.7)):
        yield {"stage": "model", "table": "memory", "case": f"{kernel} {OP} bf16", "variant": "tilewright",
               "share_of_H100": 1.0, "share_of_H200": share}  # fmt: skip


def measured(factor):
    """A GPU's rows: attention takes `factor` times the prediction at head dim 128, and twice that at 64."""
    for shape, slower in zip(SHAPES, (2, 1), strict=True):
        yield {"stage": "attention", "case": f"{shape} forward", "variant": "tilewright, portable",
               "p50_ms": slower * factor, "tflop_per_s": 500.0 / factor}  # fmt: skip
    for direction in ("forward", "backward"):
        yield {
            "stage": "kernels",
            "case": f"{OP} {direction}",
            "variant": "tilewright",
            "p50_ms": 1.0,
            "share_of_roofline": 0.8,
        }


def test_predictions_without_a_gpu_have_no_verdict():
    runs = [run("1", predicted(), "A CPU"), run("2", measured(1.0), "A CPU")]
    rows = attention_predictions(runs)
    assert [(row["case"], row["device"], row["measured_ms"]) for row in rows[:1]] == [
        ("attention K64 forward", "not measured", None)
    ]
    assert len(rows) == 6
    assert fitted_factors(rows) == bandwidth_predictions(runs) == []


def test_predictions_stand_beside_the_newest_measurement(tmp_path):
    runs = [run("1", predicted(), "A CPU"), run("2", measured(5.0)), run("3", measured(1.25))]
    rows = {row["case"]: row for row in attention_predictions(runs)}
    row = rows["attention K128 forward"]
    assert (row["device"], row["measured_ms"], row["measured_tflop_per_s"]) == ("NVIDIA H200", 1.25, 400.0)
    assert row["share_of_prediction"] == pytest.approx(0.8)
    assert rows["attention K128 backward"]["share_of_prediction"] is None
    # The median of 0.8 and 0.4.
    (fitted,) = fitted_factors([*rows.values()])
    assert (fitted["case"], fitted["variant"], fitted["factor"]) == ("forward", "portable", CALIBRATION["portable"])
    assert fitted["fitted"] == pytest.approx(0.6 * CALIBRATION["portable"])
    forward, backward = bandwidth_predictions(runs)
    names = ("case", "share_of_bandwidth_predicted", "share_of_bandwidth_measured")
    assert [forward[name] for name in names] == [f"{OP} forward", 1.0, 0.8]
    # The slowest of the kernels counts.
    assert [backward[name] for name in names] == [f"{OP} backward", 0.7, 0.8]
    page = render(runs, tmp_path)
    assert f"| forward | portable | {CALIBRATION['portable']} | 0.486 |" in page
    assert f"| {OP} backward | tilewright | 70.0% | 80.0% | NVIDIA H200 |" in page


def test_unknown_gpus_and_rows_without_figures_are_left_out():
    partial = [{"stage": "model", "table": table, "case": "x"} for table in ("predicted", "memory")]
    assert bandwidth_predictions([run("1", predicted()), run("2", measured(1.0), "NVIDIA B200")]) == []
    rows = attention_predictions([run("1", partial), run("2", [{"stage": "attention", "case": "x", "variant": "None"}])])
    assert [row["share_of_prediction"] for row in rows] == [None]
    assert fitted_factors(rows) == []
