"""Format figures for the console and the report: units in the heading, three digits, shares in percent."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PERCENT = ("share_of", "mfu", "best_mfu", "occupancy", "overhead", "host_share")
# Error of the predicted memory, and the groups of `train.profile` as shares of a step.
_SHARES = ("error", "matmul", "attention", "own", "elementwise", "optimizer", "copy", "communication", "idle")
_HIDDEN = ("table", "stage", "op", "size", "preliminary")
_HEADINGS = {
    "p50_ms": "ms",
    "p20_ms": "from ms",
    "p80_ms": "to ms",
    "count": "n",
    "suspicious": "note",
    "speedup": "times our time",
}
_FIRST = ("case", "variant", "p50_ms", "p20_ms", "p80_ms", "count")
_UNITS = {"gb": "GB", "mb": "MB", "kib": "KiB", "mib": "MiB", "mhz": "MHz", "tflop": "TFLOP", "mfu": "MFU", "w": "W", "c": "°C"}


def heading(name: str) -> str:
    """Return the heading of a column."""
    words = _HEADINGS.get(name, name.replace("_per_", "/").replace("_", " "))
    return re.sub(r"[a-z]+", lambda word: _UNITS.get(word[0], word[0]), words)


def text(name: str, value: Any) -> str:
    """Return a formatted figure; '' for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if name.startswith(_PERCENT) or name in _SHARES:
        return f"{value:z.1%}"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}"


def tables(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by their table; '' holds the rows without one."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("table", ""), []).append(row)
    return found


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that any row has: names and times first, then in order of appearance, notes last."""
    found = {name for row in rows for name, value in row.items() if name not in _HIDDEN and value is not None}
    ordered = dict.fromkeys([*_FIRST, *(name for row in rows for name in row if name != "suspicious"), "suspicious"])
    return [name for name in ordered if name in found]
