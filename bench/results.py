"""The files that runs of the bench leave: JSON lines, first the machine, then every row."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..files import require_file, write_text
from .jobs import Row
from .watch import Had

# Of a CPU that is busy with other work the times are not its own.
BUSY = 0.7


@dataclass(frozen=True)
class Run:
    """One file of results."""

    path: Path
    machine: Row
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """The GPU, or the CPU where there was none."""
        return str(self.machine.get("device", "an unnamed device"))

    @property
    def is_gpu(self) -> bool:
        """Whether an NVIDIA GPU was measured."""
        return "nvidia" in self.device.lower() or self.machine.get("driver") is not None

    @property
    def date(self) -> str:
        """When it began, in UTC; '' where the file does not say."""
        return str(self.machine.get("date", ""))

    @property
    def provenance(self) -> str:
        """What it was measured on and with, in a line; what the file does not say is left out."""
        named = (("driver", "driver"), ("torch", "torch"), ("triton", "triton"), ("python", "Python"), ("commit", "commit"))
        parts = [f"{title} {self.machine[name]}" for name, title in named if self.machine.get(name)]
        load = self.machine.get("cpu_load") or 0
        if load > BUSY and not self.is_gpu:
            parts.append(f"measured while others computed (load {load:.1f})")
        return ", ".join([self.device, *parts, *([self.date[:10]] if self.date else [])])

    def stage(self, name: str) -> list[Row]:
        """Return the rows of a stage."""
        return [row for row in self.rows if row.get("stage") == name]


def _rows(path: Path) -> Iterator[Row]:
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("stage"), str):
                raise ValueError("no row")
        except ValueError as error:
            if number == len(lines):
                # A run that was killed while it wrote.
                return
            raise UserError(f"{path} is not a file of results: line {number} is no JSON object with a stage") from error
        yield row


def settled(rows: Sequence[Row]) -> list[Row]:
    """Return `rows` without preliminary ones in whose place, of the same stage, case and variant, came better ones."""

    def key(row: Row) -> tuple[Any, ...]:
        return row.get("stage"), row.get("case"), row.get("variant")

    final = {key(row) for row in rows if not row.get("preliminary") and "not_measured" not in row}
    return [row for row in rows if not row.get("preliminary") or key(row) not in final]


def _lines(path: Path) -> list[Row]:
    lines = list(_rows(require_file(path, "file of results", "make one with `tilewright bench`")))
    if not lines or lines[0].get("stage") != "machine":
        raise UserError(f"{path} is not a file of results: its first line does not name the machine")
    return lines


def read_run(path: Path) -> Run:
    """Return the run in a file; a last line that is cut off is left out, any other that is no JSON is a `UserError`.

    Preliminary rows are left out where better ones came.
    """
    machine, *lines = _lines(path)
    return Run(path, machine, tuple(settled([line for line in lines if not is_mark(line)])))


def mark(stage: str, job: str | None, ended: bool = False) -> Row:
    """Return the line that says that a job begins, or has had its turn; without a job, that all of the stage's have."""
    return {"stage": stage, "job": job} | ({"ended": True} if ended else {})


def is_mark(line: Row) -> bool:
    """Return whether a line of a file of results is no row, but a mark of a job."""
    return "job" in line


def open_locked(path: Path) -> TextIO:
    """Open a file of results, to write at its end; a `UserError` where another run does."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} is that of a run that has not ended yet") from None
    except OSError:
        pass  # some network file systems have no locks
    return file


def take_up(path: Path) -> Had:
    """Return the jobs that have had their turn in a file of results that is to go on.

    What others left, for which there was no time or in which the run was killed, is taken out of the file.
    """
    machine, *lines = _lines(path)
    if not any(is_mark(line) for line in lines) and any(line["stage"] != "machine" for line in lines):
        raise UserError(f"{path} cannot go on: it does not say which jobs had their turn, as files of older versions do not")
    # Before the file is replaced, which a run that still writes to it would not notice.
    open_locked(path).close()
    kept, of_job = [machine], None
    had: set[tuple[str, str | None]] = set()
    for line in lines:
        if not is_mark(line):
            # A GPU's state after a stage stands apart from its jobs.
            (kept if of_job is None or line["stage"] != of_job[0]["stage"] else of_job).append(line)
        elif "ended" in line:
            kept += [*(of_job or ()), line]
            had.add((line["stage"], line["job"]))
            of_job = None
        else:
            of_job = [line]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return frozenset(had)


def read_runs(folder: Path) -> list[Run]:
    """Return all runs in a folder of folders by device, oldest first; no order depends on the file system's."""
    runs = [read_run(path) for path in sorted(folder.glob("*/*.jsonl"))]
    return sorted(runs, key=lambda run: (run.date, run.path.as_posix()))
