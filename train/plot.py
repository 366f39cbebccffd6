"""Plot the loss curves of a run."""

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_file
from .config import Change
from .metrics import read_metrics

FILE_NAME = "loss.png"


def can_plot() -> bool:
    """Return whether matplotlib is installed; warn once if it is not."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    warnings.warn("plots are left out, because matplotlib is missing: pip install 'tilewright[plot]'", stacklevel=2)
    return False


def plot_losses(run: Path, history: Sequence[Change] = ()) -> Path:
    """Plot training and validation loss (nats per token) by step to `loss.png` in the run's folder; return its path.

    Vertical lines mark extensions.
    """
    # Imported here because the import takes half a second. Figure without pyplot keeps no global state.
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # Non-finite losses appear as gaps.
    training = [math.nan if row.get("loss") is None else row["loss"] for row in rows]
    axes.plot([row["step"] for row in rows], training, color="tab:blue", alpha=0.5, lw=1, label="training")
    valid = [row for row in rows if row.get("valid_loss") is not None]
    steps, losses = [row["step"] for row in valid], [row["valid_loss"] for row in valid]
    if valid:
        axes.plot(steps, losses, color="tab:red", marker="o", ms=3, label="validation")
    for name in dict.fromkeys(name for row in valid for name in row if name.startswith("valid_loss/")):
        of_source = [math.nan if row.get(name) is None else row[name] for row in valid]
        axes.plot(steps, of_source, marker=".", ms=3, lw=1, label=name.removeprefix("valid_loss/"))
    if valid:
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(0, 8), textcoords="offset points", ha="right")
    for change in history:
        axes.axvline(change.step, color="tab:gray", lw=1, ls="--")
        # x in data coordinates, y in axes coordinates.
        place = axes.get_xaxis_transform()
        axes.text(change.step, 0.98, f" {change}", transform=place, rotation=90, va="top", fontsize=7, color="tab:gray")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    if valid and valid[-1].get("valid_bits_per_byte"):
        # The ratio is constant for one validation text and tokenizer.
        nats = losses[-1] / valid[-1]["valid_bits_per_byte"]
        right = axes.secondary_yaxis("right", functions=(lambda loss: loss / nats, lambda bits: bits * nats))
        right.set_ylabel("bits per byte of the validation text")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(run / FILE_NAME) as file:
        figure.savefig(file, format="png", dpi=120)
    return run / FILE_NAME
