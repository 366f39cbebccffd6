"""Plots of `account`: FLOPs by model size and context, and the memory of a step over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import atomic_file
from ..config import MODELS, ModelConfig
from ..policy import Policy
from .flops import FLOP_GROUPS, forward_flops_by_group
from .memory import GB, TimelinePoint, training_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = dict(zip(FLOP_GROUPS, ("tab:blue", "tab:red", "tab:green", "tab:orange"), strict=True))
TIMELINE_COLORS = ("tab:gray", "tab:purple", "tab:cyan", "tab:pink")
SIZES = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONTEXTS = tuple(2**i for i in range(9, 18))


def _shares(config: ModelConfig, context: int | None, window: int | None) -> dict[str, float]:
    groups = forward_flops_by_group(config, context, window)
    return {name: 100 * flops / sum(groups.values()) for name, flops in groups.items()}


def _draw_timeline(axes: "Axes", timeline: Sequence[TimelinePoint]) -> None:
    """Draw the memory held at each operation of a step, with the phases marked."""
    parts = {
        "weights and optimizer state": [point.state / GB for point in timeline],
        "gradients": [point.gradients / GB for point in timeline],
        "saved for the backward pass": [point.saved / GB for point in timeline],
        "temporary": [point.temporary / GB for point in timeline],
    }
    # One more edge than operations, so that the last one has a width too.
    edges = range(len(timeline) + 1)
    heights = [[*values, values[-1]] for values in parts.values()]
    axes.stackplot(edges, *heights, labels=list(parts), colors=TIMELINE_COLORS, step="post")
    peak = max(point.live for point in timeline) / GB
    axes.axhline(peak, color="black", lw=0.8, ls="--", label=f"peak {peak:.3f} GB")
    phases = [point.phase for point in timeline]
    for phase in dict.fromkeys(phases):
        start = phases.index(phase)
        if start:
            axes.axvline(start, color="black", lw=0.8, ls=":")
        # The optimizer is one operation at the right edge: its name ends there.
        is_last = phase == phases[-1]
        place = len(phases) if is_last else start
        axes.annotate(
            f"{phase} ({phases.count(phase):,} operations)" if phases.count(phase) > 1 else phase,
            (place, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(-4 if is_last else 4, -6), textcoords="offset points",
            ha="right" if is_last else "left", va="top",
        )  # fmt: skip
    axes.set(xlabel="operations of the step, in order of execution", ylabel="GB (1e9 bytes)", xlim=(0, len(timeline)))
    axes.set_ylim(0, 1.12 * peak)


def plot_account(name: str, config: ModelConfig, batch_size: int, context_length: int, policy: Policy, path: Path) -> Path:
    """Plot the split of forward FLOPs by model size and context, and the memory of a step, to a PNG; return its path."""
    # `Figure` without pyplot leaves no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    sizes, contexts, timeline = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])

    names = list(SIZES) if name in SIZES else [*SIZES, name]
    bottoms = [0.0] * len(names)
    columns = [_shares(config if size == name else MODELS[size], None, policy.window) for size in names]
    for group, color in COLORS.items():
        heights = [column[group] for column in columns]
        sizes.bar(names, heights, bottom=bottoms, color=color, label=group)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    sizes.set(title="Forward FLOPs by model, at its own context", ylabel="share (%)", ylim=(0, 100))

    over = [_shares(config, context, policy.window) for context in CONTEXTS]
    contexts.stackplot(CONTEXTS, *([row[group] for row in over] for group in COLORS), colors=list(COLORS.values()))
    contexts.set(title=f"Forward FLOPs of {name} by context", xlabel="context (tokens)", ylabel="share (%)", ylim=(0, 100))
    contexts.set_xscale("log", base=2)
    contexts.set_xlim(CONTEXTS[0], CONTEXTS[-1])
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside upper center", ncols=len(COLORS))

    _draw_timeline(timeline, training_memory(config, batch_size, context_length, policy).timeline)
    timeline.set_title(f"Memory of one training step of {name}, batch {batch_size:,} x {context_length:,}")
    figure.legend(*timeline.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path
