"""Compare two bench runs case by case: faster, slower, same, or ambiguous."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..tables import print_table
from .jobs import Row
from .options import CompareConfig
from .results import Run, read_run

Verdict = Literal["faster", "slower", "same", "ambiguous"]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """Change of one case's time; the ratio of the new to the old time lies between `low` and `high`."""

    case: str
    variant: str
    before_ms: float
    after_ms: float
    low: float
    high: float
    verdict: Verdict


def verdict(low: float, high: float, threshold: float) -> Verdict:
    """Return the verdict for a ratio of times between `low` and `high`; "ambiguous" if the interval crosses a threshold."""
    if low > 1 + threshold:
        return "slower"
    if high < 1 / (1 + threshold):
        return "faster"
    return "same" if low >= 1 / (1 + threshold) and high <= 1 + threshold else "ambiguous"


def _change(key: Key, before: Row, after: Row, threshold: float) -> Change:
    (a20, a50, a80), (b20, b50, b80) = ([row.get(f"p{n}_ms", row["p50_ms"]) for n in (20, 50, 80)] for row in (before, after))
    low, high = b20 / a80, b80 / a20
    found = verdict(low, high, threshold)
    if found != "same" and min(row.get("count", 1) for row in (before, after)) < 2:
        # A single sample gives no interval, so it proves no change.
        found = "ambiguous"
    return Change(key[1], key[2], a50, b50, low, high, found)


def _timed(run: Run) -> dict[Key, Row]:
    rows = (row for row in run.rows if row.get("p50_ms"))
    return {(str(row.get("stage")), str(row.get("case")), str(row.get("variant"))): row for row in rows}


def compare(before: Run, after: Run, threshold: float = 0.05) -> tuple[list[Change], list[Key], list[Key]]:
    """Return the changes of the cases that both runs timed, and the keys (stage, case, variant) of only one run each.

    The interval of a ratio comes from the 20th and 80th percentiles: the slow end of one run over the fast end of the other.
    """
    old, new = _timed(before), _timed(after)
    changes = [_change(key, row, new[key], threshold) for key, row in old.items() if key in new]
    return changes, [key for key in old if key not in new], [key for key in new if key not in old]


def _print(console: Console, changes: list[Change], missing: Mapping[str, list[Key]]) -> None:
    table = Table("case", "variant", title="Times, after over before")
    for name in ("before ms", "after ms", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for change in changes:
        ratio = f"{change.after_ms / change.before_ms:.3f} ({change.low:.3f} to {change.high:.3f})"
        times = (f"{change.before_ms:,.4g}", f"{change.after_ms:,.4g}")
        table.add_row(escape(change.case), escape(change.variant), *times, ratio, change.verdict)
    print_table(console, table)
    for title, keys in missing.items():
        for stage, case, variant in keys:
            console.print(f"{title}: {stage}, {case}, {variant}", highlight=False, markup=False)
    verdicts = [change.verdict for change in changes]
    console.print(
        ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("faster", "slower", "same", "ambiguous")), highlight=False
    )


def run_compare(config: CompareConfig, console: Console | None = None) -> bool:
    """Print the differences between the times of two runs; return whether any case is slower."""
    before, after = read_run(config.before), read_run(config.after)
    # A table in a file can be wider than rich's default of 80 columns.
    console = console or Console(width=None if sys.stdout.isatty() else 180)
    if before.device != after.device:
        console.print(f"the runs are from different machines: {before.device} and {after.device}", highlight=False)
    changes, only_before, only_after = compare(before, after, config.threshold)
    if not changes:
        raise UserError(f"{config.before} and {config.after} have no timed case in common: compare runs of the same stages")
    _print(console, changes, {f"only in {config.before}": only_before, f"only in {config.after}": only_after})
    return any(change.verdict == "slower" for change in changes)
