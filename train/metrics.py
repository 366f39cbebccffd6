"""Metrics of a run: JSON lines in `metrics.jsonl`, and the configured tracker.

A row holds the step and numbers by name; null is a number that is not finite. A note holds the step and a text, `note`;
`read_metrics` ignores notes.
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
    """Return the rows of a run's metrics, ordered by step, without notes and damaged lines."""
    return [row for row in _read(run)[0] if "note" not in row]


def sync_metrics(run: Path) -> None:
    """Flush the logged rows to disk, so that they survive a crash of the machine."""
    path = run / FILE_NAME
    with contextlib.suppress(FileNotFoundError), named_errors(path):
        sync(path)


def _read(run: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Return rows and notes ordered by step, and the lines to drop: damaged ones and duplicates.

    If a step has two rows, the later one is kept. A last line without a newline is ignored: a crash has truncated it.
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
    # Python's json also parses NaN and Infinity.
    return row | {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}


class MetricLog:
    """Appends rows to a run's `metrics.jsonl` and sends them to its tracker."""

    def __init__(self, run: Path, tracker: str = "none", config: dict[str, Any] | None = None, resume_step: int = 0) -> None:
        """Open the log and drop the rows after `resume_step`, which a resumed run writes again.

        Damaged and duplicate lines are moved to `metrics.dropped.jsonl`, with a warning on stderr.
        """
        rows, damaged = _read(run)
        kept = []
        for row in rows:
            if "note" in row:
                # Notes stay valid after a resume.
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
        """Log the metrics of a step."""
        self._write({"step": step, **metrics})
        self._tracker.log({name: value for name, value in metrics.items() if value is not None}, step)

    def note(self, step: int, note: str) -> None:
        """Write a note about the rows from `step` on, unless the same note exists already."""
        if (step, note) not in self._notes:
            self._notes.add((step, note))
            self._write({"step": step, "note": note})

    def text(self, step: int, name: str, text: str) -> None:
        """Send a text to the tracker."""
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
    print(f"{run / FILE_NAME}: moved {len(lines)} damaged or duplicate lines to {path}", file=sys.stderr)
