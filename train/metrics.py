"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and on to a tracker where one is asked for.

A row has the step and numbers by name, null for one that is not finite. A note has the step and a text, `note`: readers of
the numbers pass over it.
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from ..files import atomic_file, named_errors, sync, write_text
from .tracker import open_tracker

FILE_NAME = "metrics.jsonl"
DROPPED_FILE = "metrics.dropped.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics by step, without notes and lines that are damaged."""
    return [row for row in _read(run)[0] if "note" not in row]


def sync_metrics(run: Path) -> None:
    """Return when the rows that have been logged, if any, would outlive a crash of the machine."""
    path = run / FILE_NAME
    with contextlib.suppress(FileNotFoundError), named_errors(path):
        sync(path)


def _read(run: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return rows and notes by step, and the lines that are neither; a last line cut short by a crash is no line.

    Of two rows of a step the later one counts.
    """
    path = run / FILE_NAME
    *lines, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows: dict[int, tuple[dict[str, Any], bytes]] = {}
    notes, dropped = [], []
    for line in lines:
        row = _parse(line)
        if row is None:
            dropped.append(line)
        elif "note" in row:
            notes.append(row)
        else:
            if row["step"] in rows:
                dropped.append(rows[row["step"]][1])
            rows[row["step"]] = row, line
    # A note comes before the row of its step.
    found = [*notes, *(row for row, _ in rows.values())]
    return sorted(found, key=lambda row: row["step"]), dropped


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    values = {name: value for name, value in row.items() if name not in ("step", "note")}
    if not all(value is None or type(value) in (int, float) for value in values.values()):
        return None
    if not isinstance(row.get("note", ""), str):
        return None
    # Others write NaN, which JSON does not know.
    return row | {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}


class MetricLog:
    """Appends rows to a run's `metrics.jsonl` and hands them on to its tracker."""

    def __init__(self, run: Path, tracker: str = "none", config: dict[str, Any] | None = None, resume_step: int = 0) -> None:
        """Open the log; rows after `resume_step` are dropped, because a resumed run writes them again.

        Lines that cannot be read go to `metrics.dropped.jsonl`, and are spoken of on stderr.
        """
        rows, damaged = _read(run)
        kept = []
        for row in rows:
            if "note" in row:
                # What it speaks of still holds.
                kept.append(row | {"step": min(row["step"], resume_step)})
            elif row["step"] <= resume_step:
                kept.append(row)
        self._path = run / FILE_NAME
        if damaged:
            _set_aside(run, damaged)
        self._tracker = open_tracker(tracker, run, config or {}, resume_step, rewinds=len(kept) < len(rows))
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._notes = {(row["step"], row["note"]) for row in kept if "note" in row}
        self._file = self._path.open("a", buffering=1)

    def log(self, step: int, **metrics: float | None) -> None:
        """Write one row."""
        self._write({"step": step, **metrics})
        self._tracker.log({name: value for name, value in metrics.items() if value is not None}, step)

    def note(self, step: int, note: str) -> None:
        """Write what the rows from `step` on have to be read with, unless it is there already."""
        if (step, note) not in self._notes:
            self._notes.add((step, note))
            self._write({"step": step, "note": note})

    def text(self, step: int, name: str, text: str) -> None:
        """Hand a text on to the tracker."""
        self._tracker.text(name, text, step)

    def _write(self, row: dict[str, Any]) -> None:
        with named_errors(self._path):
            self._file.write(json.dumps(row) + "\n")

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with named_errors(self._path):
                self._file.close()
        finally:
            self._tracker.close()


def _set_aside(run: Path, lines: list[bytes]) -> None:
    path = run / DROPPED_FILE
    earlier = path.read_bytes() if path.exists() else b""
    with atomic_file(path) as file:
        file.write(earlier + b"".join(line + b"\n" for line in lines))
    print(f"{run / FILE_NAME}: {len(lines)} lines are damaged or double; they are kept in {path}", file=sys.stderr)
