"""Results of a sweep: aggregated over seeds, ranked, and formatted as a table."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

SEED = "seed"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def name_of(settings: Mapping[str, Any]) -> str:
    """Return the settings in the notation of the grid."""
    return ",".join(f"{name}={_text(value)}" for name, value in settings.items())


@dataclass(frozen=True)
class SweepPoint:
    """One point of the grid and the result of its run; losses are in nats per token, None if the run did not finish."""

    settings: dict[str, Any]
    run: str
    """Name of the run's folder inside the sweep's folder."""
    status: Literal["finished", "diverged", "out of memory"]
    valid_loss: float | None = None
    train_loss: float | None = None
    tokens_per_second: float | None = None
    reason: str | None = None
    """Why the run did not finish."""
    valid_bits_per_byte: float | None = None
    """The validation loss in bits per byte of text."""
    train_bits_per_byte: float | None = None


@dataclass(frozen=True)
class SetPoint:
    """Points that differ only in their seed."""

    settings: dict[str, Any]
    points: tuple[SweepPoint, ...]

    @property
    def losses(self) -> list[float]:
        """Validation losses of the runs that finished."""
        return [point.valid_loss for point in self.points if point.valid_loss is not None]

    @property
    def valid_loss(self) -> float:
        """Mean validation loss of the runs that finished; infinity if there are none."""
        return sum(self.losses) / len(self.losses) if self.losses else math.inf

    @property
    def all_finished(self) -> bool:
        """Whether the runs of all seeds finished."""
        return len(self.losses) == len(self.points)


@dataclass(frozen=True)
class SweepResult:
    """A sweep's points, in the order of its grid."""

    out: Path
    axes: dict[str, list[Any]]
    points: tuple[SweepPoint, ...]

    @property
    def complete(self) -> bool:
        """Whether all points of the grid have run."""
        return len(self.points) == math.prod(len(values) for values in self.axes.values())

    def ranking(self) -> list[SetPoint]:
        """Return the points aggregated over seeds, sorted by mean validation loss; those with unfinished runs come last."""
        groups: dict[str, list[SweepPoint]] = {}
        for point in self.points:
            groups.setdefault(name_of(_without_seed(point.settings)), []).append(point)
        joined = [SetPoint(_without_seed(points[0].settings), tuple(points)) for points in groups.values()]
        return sorted(joined, key=lambda each: (not each.all_finished, each.valid_loss))


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != SEED}


def sweep_table(result: SweepResult) -> Table:
    """Return the points as a table, best first."""
    axes = [name for name in result.axes if name != SEED]
    seeds = len(result.axes.get(SEED, [0]))
    caption = "spread: highest minus lowest validation loss over the seeds" if seeds > 1 else None
    table = Table(title=str(result.out), caption=caption)
    short = [name.rpartition(".")[2] for name in axes]
    names = short if len({*short}) == len(short) else axes
    spread = ["spread"] if seeds > 1 else []
    for name in (*names, "valid loss", *spread, "bits/byte", "train loss", "train bits/byte", "tokens/s", "runs"):
        table.add_column(name, justify="right")

    def mean(values: list[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return format(sum(known) / len(known), form) if known else "-"

    for i, group in enumerate(result.ranking()):
        losses, points = group.losses, group.points
        counts = {status: sum(point.status == status for point in points) for status in dict.fromkeys(p.status for p in points)}
        table.add_row(
            *(_text(group.settings[name]) for name in axes),
            mean([*losses], ".4f"),
            *([f"{max(losses) - min(losses):.4f}" if losses else "-"] if seeds > 1 else []),
            mean([point.valid_bits_per_byte for point in points], ".4f"),
            mean([point.train_loss for point in points], ".4f"),
            mean([point.train_bits_per_byte for point in points], ".4f"),
            mean([point.tokens_per_second for point in points], ",.0f"),
            ", ".join(f"{count} {status}" if seeds > 1 else status for status, count in counts.items()),
            style="bold" if i == 0 and group.all_finished else None,
        )
    return table
