"""Predictions of the static model beside the measurements of a GPU, and the constants that would fit them."""

import statistics
from collections.abc import Sequence
from typing import Any

from .attention_peers import variant_of
from .jobs import Row
from .loop_model import CALIBRATION
from .results import Run, newest
from .static_model import PREDICTED

ASSUMED = """\
Predicted by the static model of the kernels' machine code (see docs/method.md), for an H100 with 132 multiprocessors at
1.83 GHz. The model assumes that loads arrive in time. One factor per kernel accounts for power and clocks."""
NOT_MEASURED = "not measured"


def _measured(runs: Sequence[Run], *stages: str) -> dict[tuple[Any, Any], tuple[Run, Row]]:
    """Return the newest measurement on a GPU of each (case, variant)."""
    on_gpu, found = [run for run in runs if run.is_gpu], {}
    for stage in stages:
        for run, rows in reversed(newest(on_gpu, stage)):
            found |= {(row.get("case"), row.get("variant")): (run, row) for row in rows}
    return found


def _predicted(runs: Sequence[Run], table: str) -> list[Row]:
    return [row for _, rows in newest(runs, "model") for row in rows if row.get("table") == table]


def attention_predictions(runs: Sequence[Run]) -> list[Row]:
    """Return the newest predictions for causal attention, each with the newest GPU measurement, if any."""
    measured, found = _measured(runs, "attention"), []
    for row in _predicted(runs, PREDICTED):
        run, one = measured.get((row.get("case"), variant_of(str(row.get("variant")))), (None, {}))
        ms = one.get("p50_ms")
        found.append({
            **row,
            "measured_ms": ms,
            "measured_tflop_per_s": one.get("tflop_per_s"),
            "share_of_prediction": ms and row.get("predicted_ms") and row["predicted_ms"] / ms,
            "device": run.device if run else NOT_MEASURED,
        })  # fmt: skip
    return found


def bandwidth_predictions(runs: Sequence[Run]) -> list[Row]:
    """Return the measured memory-bound ops on Hopper, each with the predicted share of the bandwidth of its slowest kernel.

    The measured share is relative to a copy in the same run.
    """
    measured, found = _measured(runs, "kernels", "attention"), {}
    for row in _predicted(runs, "memory"):
        kernel, _, op = str(row.get("case")).partition(" ")
        direction = "backward" if "backward" in kernel else "forward"
        case, variant = f"{op.removesuffix(' bf16')} {direction}", row.get("variant")
        run, one = measured.get((case, variant), (None, {}))
        gpu = next((name for name in ("H100", "H200") if run and name in run.device), None)
        # Attention's small kernels take little of the time of its backward pass.
        if gpu is None or run is None or one.get("share_of_roofline") is None or kernel.startswith("attention_backward"):
            continue
        predicted = min(
            row.get(f"share_of_{gpu}", 1.0), found.get((case, variant), {}).get("share_of_bandwidth_predicted", 1.0)
        )
        found[case, variant] = {
            "case": case,
            "variant": variant,
            "share_of_bandwidth_predicted": predicted,
            "share_of_bandwidth_measured": one["share_of_roofline"],
            "device": run.device,
        }
    return [*found.values()]


def fitted_factors(attention: Sequence[Row]) -> list[Row]:
    """Return, for each form of attention's kernels and direction, the factor of `CALIBRATION` that fits the measurements.

    A factor is one for all head dims: the median over them.
    """
    shares: dict[tuple[str, str], list[float]] = {}
    for row in attention:
        direction = str(row.get("case")).rsplit(" ", 1)[-1]
        form = str(row.get("variant"))
        if direction != "both" and form in CALIBRATION and row.get("share_of_prediction"):
            shares.setdefault((form, direction), []).append(row["share_of_prediction"])
    return [
        {
            "case": direction,
            "variant": form,
            "factor": CALIBRATION[form],
            "fitted": CALIBRATION[form] * statistics.median(found),
        }
        for (form, direction), found in shares.items()
    ]
