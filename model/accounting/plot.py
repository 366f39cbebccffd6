"""The pictures of `account`: where FLOPs go over sizes and contexts, and what a step holds as it goes."""

from pathlib import Path

from ...files import atomic_file
from ..config import MODELS, ModelConfig
from .flops import FLOP_GROUPS, forward_flops_by_group
from .memory import GB, training_memory
from .policy import Policy

COLORS = dict(zip(FLOP_GROUPS, ("tab:blue", "tab:red", "tab:green", "tab:orange"), strict=True))
SIZES = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONTEXTS = tuple(2**i for i in range(9, 18))


def _shares(config: ModelConfig, context: int | None, window: int | None) -> dict[str, float]:
    groups = forward_flops_by_group(config, context, window)
    return {name: 100 * flops / sum(groups.values()) for name, flops in groups.items()}


def plot_account(name: str, config: ModelConfig, batch_size: int, context_length: int, policy: Policy, path: Path) -> Path:
    """Draw the split of forward FLOPs over model sizes and contexts, and the memory of a step, to a PNG; return its path."""
    # Without pyplot, no state outlives the call.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    sizes, contexts, timeline = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])

    names = [size for size in SIZES if size != name] + [name]
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

    memory = training_memory(config, batch_size, context_length, policy)
    parts = {
        "weights and optimizer state": [moment.state / GB for moment in memory.timeline],
        "gradients": [moment.gradients / GB for moment in memory.timeline],
        "saved for the backward pass": [moment.saved / GB for moment in memory.timeline],
        "temporary": [moment.temporary / GB for moment in memory.timeline],
    }
    timeline.stackplot(range(len(memory.timeline)), *parts.values(), labels=list(parts), step="post")
    timeline.axhline(memory.peak / GB, color="black", lw=0.8, ls="--", label=f"peak {memory.peak / GB:.3f} GB")
    timeline.set(
        title=f"Memory of a step of {name}, batch {batch_size:,} x {context_length:,}: forward, backward, optimizer",
        xlabel="operation",
        ylabel="GB (1e9 bytes)",
        xlim=(0, len(memory.timeline) - 1),
    )
    timeline.legend(loc="lower center", ncols=5)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path
