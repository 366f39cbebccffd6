"""The loss curve of a run."""

import math
from pathlib import Path

from ..files import atomic_file
from .metrics import read_metrics

FILE_NAME = "loss.png"


def plot_losses(run: Path) -> Path:
    """Draw training and validation loss (nats per token) over the steps to `loss.png` in the run's folder; return its path."""
    # Imported here, because nothing else needs the half second that it takes; without pyplot, no state outlives the call.
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # A loss that was not finite is a gap.
    training = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    axes.plot([row["step"] for row in rows], training, color="tab:blue", alpha=0.5, lw=1, label="training")
    valid = [row for row in rows if "valid_loss" in row]
    steps, losses = [row["step"] for row in valid], [row["valid_loss"] for row in valid]
    axes.plot(steps, losses, color="tab:red", marker="o", ms=3, label="validation")
    if valid:
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(0, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(run / FILE_NAME) as file:
        figure.savefig(file, format="png", dpi=120)
    return run / FILE_NAME
