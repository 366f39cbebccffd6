"""Two runs of the bench, case by case: faster, slower, the same, or not to be told apart."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from .jobs import Row
from .results import Run, read_run

Verdict = Literal["faster", "slower", "same", "ambiguous"]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class CompareConfig:
    """Which runs to compare."""

    before: tyro.conf.Positional[Path]
    """File of results."""
    after: tyro.conf.Positional[Path]
    """File of results."""
    threshold: float = 0.05
    """Changes up to this share of the time count as none."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold is {self.threshold}: it must be 0 or more, and below 1")


@dataclass(frozen=True)
class Change:
    """How one case's time changed: `low` to `high` is where the new time over the old one lies."""

    case: str
    variant: str
    before_ms: float
    after_ms: float
    low: float
    high: float
    verdict: Verdict


def verdict(low: float, high: float, threshold: float) -> Verdict:
    """Return what a ratio of times between `low` and `high` says; "ambiguous" where the interval crosses a threshold."""
    if low > 1 + threshold:
        return "slower"
    if high < 1 / (1 + threshold):
        return "faster"
    return "same" if low >= 1 / (1 + threshold) and high <= 1 + threshold else "ambiguous"


def _change(key: Key, before: Row, after: Row, threshold: float) -> Change:
    (a20, a50, a80), (b20, b50, b80) = ([row.get(f"p{n}_ms", row["p50_ms"]) for n in (20, 50, 80)] for row in (before, after))
    low, high = b20 / a80, b80 / a20
    told = verdict(low, high, threshold)
    if told != "same" and min(row.get("count", 1) for row in (before, after)) < 2:
        # One time is no interval: it proves no change.
        told = "ambiguous"
    return Change(key[1], key[2], a50, b50, low, high, told)


def _timed(run: Run) -> dict[Key, Row]:
    rows = (row for row in run.rows if row.get("p50_ms"))
    return {(str(row.get("stage")), str(row.get("case")), str(row.get("variant"))): row for row in rows}


def compare(before: Run, after: Run, threshold: float = 0.05) -> tuple[list[Change], list[Key], list[Key]]:
    """Return the changes of all cases that both runs timed, and those (stage, case, variant) of only one of them.

    The interval of a ratio is that of the 20th and 80th percentiles: the worst of one over the best of the other.
    """
    old, new = _timed(before), _timed(after)
    changes = [_change(key, row, new[key], threshold) for key, row in old.items() if key in new]
    return changes, [key for key in old if key not in new], [key for key in new if key not in old]


def _print(console: Console, changes: list[Change], missing: Mapping[str, list[Key]]) -> None:
    table = Table("case", "variant", "before ms", "after ms", "ratio", "verdict", title="Times, after over before")
    for change in changes:
        ratio = f"{change.after_ms / change.before_ms:.3f} ({change.low:.3f} to {change.high:.3f})"
        times = (f"{change.before_ms:,.4g}", f"{change.after_ms:,.4g}")
        table.add_row(escape(change.case), escape(change.variant), *times, ratio, change.verdict)
    console.print(table)
    for title, keys in missing.items():
        for stage, case, variant in keys:
            console.print(f"{title}: {stage}, {case}, {variant}", highlight=False, markup=False)
    verdicts = [change.verdict for change in changes]
    console.print(
        ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("faster", "slower", "same", "ambiguous")), highlight=False
    )


def run_compare(config: CompareConfig, console: Console | None = None) -> bool:
    """Print how the times of two runs differ; return whether something has become slower."""
    before, after = read_run(config.before), read_run(config.after)
    # In a file a table may be wider than the 80 columns that are assumed there.
    console = console or Console(width=None if sys.stdout.isatty() else 180)
    if before.device != after.device:
        console.print(f"these are two machines: {before.device} and {after.device}", highlight=False)
    changes, only_before, only_after = compare(before, after, config.threshold)
    if not changes:
        raise UserError(f"{config.before} and {config.after} have no timed case in common: compare runs of the same stages")
    _print(console, changes, {f"only in {config.before}": only_before, f"only in {config.after}": only_after})
    return any(change.verdict == "slower" for change in changes)
