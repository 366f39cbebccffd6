"""Plot a sweep: losses by step, and the final loss by each axis of the grid."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import atomic_file
from ..metrics import read_metrics
from .result import SEED, SetPoint, SweepResult, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_NAME = "sweep.png"
_MOST_LABELS = 12


def _label(settings: dict[str, Any]) -> str:
    words = {name.rpartition(".")[2]: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())


def _draw_curves(axes: "Axes", result: SweepResult, ranking: list[SetPoint], colours: dict[str, Any]) -> None:
    starts = []
    for i, group in enumerate(ranking):
        colour = colours[name_of(group.settings)]
        label = _label(group.settings) if i < _MOST_LABELS else ""
        for point in group.points:
            rows = [row for row in read_metrics(result.out / point.run) if "loss" in row]
            axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=colour, alpha=0.35, lw=0.8)
            valid = [row for row in rows if row.get("valid_loss") is not None]
            steps, losses = [row["step"] for row in valid], [row["valid_loss"] for row in valid]
            # One legend entry for each group, on a line that has points.
            axes.plot(steps, losses, color=colour, marker="o", ms=3, lw=1.2, label=label if valid else "")
            label = "" if valid else label
            starts += [row["loss"] for row in rows[:1] if row["loss"] is not None]
    if starts:
        # Clip diverged runs, so that they do not compress the other curves.
        axes.set_ylim(top=1.05 * max(starts))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss of each run: validation (dots), training (thin lines)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", title="best first", title_fontsize="x-small")


def _draw_axis(axes: "Axes", name: str, values: list[Any], ranking: list[SetPoint]) -> None:
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = values if numeric else list(range(len(values)))
    lines: dict[str, tuple[dict[str, Any], dict[int, SetPoint]]] = {}
    for group in ranking:
        others = {other: value for other, value in group.settings.items() if other != name}
        lines.setdefault(name_of(others), (others, {}))[1][values.index(group.settings[name])] = group
    for others, groups in lines.values():
        found = [(places[i], groups[i]) for i in sorted(groups, key=places.__getitem__) if groups[i].losses]
        xs, means = [x for x, _ in found], [group.valid_loss for _, group in found]
        # Rounding in the mean can make the differences slightly negative.
        below = [max(0.0, group.valid_loss - min(group.losses)) for _, group in found]
        above = [max(0.0, max(group.losses) - group.valid_loss) for _, group in found]
        drawn = axes.errorbar(xs, means, yerr=(below, above), marker="o", ms=4, capsize=3, label=_label(others) or None)
        failed = [places[i] for i, group in groups.items() if not group.all_finished]
        # At the top edge: x in data coordinates, y in axes coordinates.
        axes.plot(failed, [0.98] * len(failed), "x", color=drawn.lines[0].get_color(), transform=axes.get_xaxis_transform())
    if numeric and min(values) > 0 and max(values) >= 4 * min(values):
        axes.set_xscale("log")
    axes.set_xticks(places, labels=[f"{value:g}" if numeric else str(value) for value in values])
    axes.minorticks_off()
    notes = []
    if any(len(group.points) > 1 for group in ranking):
        notes.append("mean over seeds, bars from lowest to highest")
    if not all(group.all_finished for group in ranking):
        notes.append("x: at least one run did not finish")
    axes.set(xlabel=name, ylabel="validation loss (nats per token)")
    axes.set_title("\n".join([f"Final validation loss by {name}", *notes]), fontsize="medium")
    if len(lines) <= _MOST_LABELS and any(others for others, _ in lines.values()):
        axes.legend(fontsize="x-small")


def plot_sweep(result: SweepResult) -> Path:
    """Plot the losses of all runs by step, and the final validation loss by each axis, to `sweep.png`; return its path.

    Runs that differ only in their seed have the same color, and are aggregated to their mean with error bars from the minimum
    to the maximum.
    """
    # Imported here because the import takes half a second. Figure without pyplot keeps no global state.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ranking = result.ranking()
    shades = colormaps["viridis"]
    # The best settings get the darkest color.
    colours = {name_of(group.settings): shades(0.9 * i / max(1, len(ranking) - 1)) for i, group in enumerate(ranking)}
    names = [name for name, values in result.axes.items() if name != SEED and len(values) > 1]
    figure = Figure(figsize=(6.5 + 4.5 * len(names), 4.5), layout="constrained")
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    _draw_curves(panels[0], result, ranking, colours)
    for axes, name in zip(panels[1:], names, strict=True):
        _draw_axis(axes, name, result.axes[name], ranking)
    for axes in panels:
        axes.grid(alpha=0.3)
    with atomic_file(result.out / FILE_NAME) as file:
        figure.savefig(file, format="png", dpi=120)
    return result.out / FILE_NAME
