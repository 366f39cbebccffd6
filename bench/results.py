"""Result files of the bench: JSON lines, first the machine, then every row."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..files import require_file, write_text
from .jobs import Row
from .watch import DoneJobs

# Stages whose rows are meaningful only together.
SINGLE_RUN_STAGES = ("machine", "ceilings", "tests", "accounting", "inspect", "model")
# Above this load, other work distorts a CPU's times.
BUSY = 0.7


@dataclass(frozen=True)
class Run:
    """One results file."""

    path: Path
    machine: Row
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """The GPU, or the CPU of a run without one."""
        return str(self.machine.get("device", "an unnamed device"))

    @property
    def is_gpu(self) -> bool:
        """Whether an NVIDIA GPU was measured."""
        return "nvidia" in self.device.lower() or self.machine.get("driver") is not None

    @property
    def date(self) -> str:
        """Start of the run in UTC; '' if the file lacks it."""
        return str(self.machine.get("date", ""))

    @property
    def provenance(self) -> str:
        """Device and versions of the run in one line, without missing values."""
        named = (("driver", "driver"), ("torch", "torch"), ("triton", "triton"), ("python", "Python"), ("commit", "commit"))
        parts = [f"{title} {self.machine[name]}" for name, title in named if self.machine.get(name)]
        load = self.machine.get("cpu_load") or 0
        if load > BUSY and not self.is_gpu:
            parts.append(f"measured under other load ({load:.1f})")
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
                # A run was killed while it wrote the line.
                return
            raise UserError(f"{path} is not a results file: line {number} is not a JSON object with a stage") from error
        yield row


def final_rows(rows: Sequence[Row]) -> list[Row]:
    """Return `rows` without preliminary rows that a final row of the same stage, case and variant replaces."""

    def key(row: Row) -> tuple[Any, ...]:
        return row.get("stage"), row.get("case"), row.get("variant")

    final = {key(row) for row in rows if not row.get("preliminary") and "not_measured" not in row}
    return [row for row in rows if not row.get("preliminary") or key(row) not in final]


def _lines(path: Path) -> list[Row]:
    lines = list(_rows(require_file(path, "results file", "make one with `tilewright bench`")))
    if not lines or lines[0].get("stage") != "machine":
        raise UserError(f"{path} is not a results file: its first line does not name the machine")
    return lines


def read_run(path: Path) -> Run:
    """Return the run in a file, without preliminary rows that were replaced.

    An incomplete last line is skipped; any other line that is not JSON is a `UserError`.
    """
    machine, *lines = _lines(path)
    return Run(path, machine, tuple(final_rows([line for line in lines if not is_mark(line)])))


def mark(stage: str, job: str | None, ended: bool = False) -> Row:
    """Return the line that marks the start or the end of a job; without a job, the end of the stage."""
    return {"stage": stage, "job": job} | ({"ended": True} if ended else {})


def is_mark(line: Row) -> bool:
    """Return whether a line of a results file is a mark instead of a row."""
    return "job" in line


def open_locked(path: Path) -> TextIO:
    """Open a results file for appending; raise `UserError` if another run writes to it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} belongs to a run that has not ended yet") from None
    except OSError:
        pass  # some network file systems have no locks
    return file


def prepare_resume(path: Path) -> DoneJobs:
    """Prepare a results file for resuming; return the jobs that are done.

    Rows of other jobs are removed: those without time left, and the job in which the run was killed.
    """
    machine, *lines = _lines(path)
    if not any(is_mark(line) for line in lines) and any(line["stage"] != "machine" for line in lines):
        raise UserError(f"{path} cannot be resumed: it does not list finished jobs, like files of older versions")
    # Check the lock before the file is replaced: a run that writes to it would keep the old file.
    open_locked(path).close()
    kept, of_job = [machine], None
    done: set[tuple[str, str | None]] = set()
    for line in lines:
        if not is_mark(line):
            # Rows on the GPU's state after a stage belong to no job.
            (kept if of_job is None or line["stage"] != of_job[0]["stage"] else of_job).append(line)
        elif "ended" in line:
            kept += [*(of_job or ()), line]
            done.add((line["stage"], line["job"]))
            of_job = None
        else:
            of_job = [line]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return frozenset(done)


def read_runs(folder: Path) -> list[Run]:
    """Return all runs in a folder of device folders, oldest first, in an order independent of the file system."""
    runs = [read_run(path) for path in sorted(folder.glob("*/*.jsonl"))]
    return sorted(runs, key=lambda run: (run.date, run.path.as_posix()))


def newest(runs: Sequence[Run], stage: str) -> list[tuple[Run, list[Row]]]:
    """Return the measurements of a stage from `runs` (oldest first), newest first; each case from its newest run.

    A case that a newer run skipped keeps its older measurement.
    """
    found: list[tuple[Run, list[Row]]] = []
    seen: set[Any] = set()
    for run in reversed(runs):
        measured = [row for row in run.stage(stage) if "not_measured" not in row]
        new = [row for row in measured if row.get("case") not in seen]
        if new:
            found.append((run, new))
        if found and stage in SINGLE_RUN_STAGES:
            break
        seen |= {row.get("case") for row in measured if not row.get("preliminary")}
    return found
