"""Run the stages of the bench in turn, and write every row to disk at once."""

import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..files import require_absent
from ..tables import print_table
from ..train.device import resolve_device
from .figures import columns, heading, tables, text
from .jobs import Row, lacks_time
from .machine import describe
from .options import BenchConfig, TuneConfig
from .results import final_rows, mark, open_locked, prepare_resume, read_run
from .stages import Stage, chosen_stages, tune_stage
from .watch import DoneJobs, Event
from .worker import run_here, run_in_workers

# Until a worker has imported PyTorch and a GPU has answered: the first stage would have no time left.
STARTING_S = 10.0
# Longer tables are only in the file.
SHOWN_ROWS = 120


def _table(title: str, rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    shown = columns(rows)
    for name in shown:
        table.add_column(heading(name), justify="left" if name in ("case", "variant") else "right")
    for row in rows:
        # Error messages can contain text that looks like markup.
        table.add_row(*(escape(text(name, row.get(name))) for name in shown))
    return table


def _show(console: Console, stage: str, rows: list[Row]) -> None:
    # Reasons are long and figures many, so each gets its own table.
    left_out = [row for row in rows if "not_measured" in row]
    measured = tables(row for row in rows if "not_measured" not in row)
    parts = {f"{stage}: {name}" if name else stage: part for name, part in measured.items()}
    if left_out:
        parts[f"{stage}: not measured"] = [*left_out]
    for title, part in parts.items():
        if len(part) > SHOWN_ROWS:
            console.print(f"{title}: {len(part):,} rows, in the file only", highlight=False)
        else:
            print_table(console, _table(title, part))


def _console() -> Console:
    # A table in a file can be wider than rich's default of 80 columns.
    return Console(width=None if sys.stdout.isatty() else 180)


def slug(device: str) -> str:
    """Return a folder name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


class _Results:
    """The results file of a run; every row is flushed to disk at once."""

    def __init__(self, path: Path) -> None:
        self._file = open_locked(path)

    def keep(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> "_Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _summary(case: str, rows: Sequence[Row]) -> str:
    """Summarize a job in a few words: our time, or the first one, and the rows that were not measured."""
    measured = [row for row in final_rows(rows) if "not_measured" not in row]
    timed = sorted((row for row in measured if "p50_ms" in row), key=lambda row: row.get("variant") != "tilewright")
    parts = [str(row["summary"]) for row in measured if row.get("summary")]
    if timed:
        what = f"{str(timed[0]['case']).removeprefix(case)} {timed[0].get('variant', '')}".strip()
        parts = [f"{text('p50_ms', timed[0]['p50_ms'])} ms {what}".strip()]
    reasons = [str(row["not_measured"]) for row in rows if "not_measured" in row]
    # A failure of the job itself has no variant.
    own = [str(row["not_measured"]) for row in rows if "not_measured" in row and "variant" not in row]
    parts += own[-1:] or ([f"{len(reasons)} not measured"] if reasons else [])
    return "; ".join(parts or [f"{len(measured)} rows"])


def _record(events: Iterable[Event], results: _Results, console: Console) -> int:
    """Write every row, print a line per job and a table per stage; return the number of jobs without time left."""
    of_stages: defaultdict[str, list[Row]] = defaultdict(list)
    of_job: list[Row] = []
    began, lacking = 0.0, 0
    for event in events:
        stage = event.get("stage", "")
        if "row" in event:
            row = event["row"]
            results.keep({"stage": stage, **row})
            of_stages[stage].append(row)
            of_job.append(row)
            lacking += lacks_time(row)
        elif "begin" in event and not event.get("quiet"):
            results.keep(mark(stage, event["begin"]))
            of_job, began = [], time.monotonic()
        elif "end" in event:
            results.keep(mark(stage, event["end"], ended=True))
            line = f"{stage}: {event['end']}: {_summary(event['end'], of_job)} ({time.monotonic() - began:.0f} s)"
            # Error messages can span lines.
            console.print(" ".join(line.split()), highlight=False, markup=False)
        elif "over" in event:
            if event["complete"]:
                results.keep(mark(stage, None, ended=True))
            _show(console, stage, final_rows(of_stages.pop(stage, [])))
    return lacking


def _share(stage: Stage, is_gpu: bool) -> float:
    return stage.gpu_s if is_gpu else stage.cpu_s or 0


def _ends(stages: Mapping[str, Stage], is_gpu: bool, seconds: float) -> dict[str, float]:
    """Return the deadline of each stage, for `seconds` in all; unused time of a stage goes to the next."""
    shares, now = [_share(stage, is_gpu) for stage in stages.values()], time.monotonic()
    if not any(shares) or math.isinf(seconds):
        return dict.fromkeys(stages, now + seconds)
    first = min(STARTING_S, seconds / 2) if is_gpu else 0.0
    whole = sum(shares)
    return {name: now + first + (seconds - first) * sum(shares[:i]) / whole for i, name in enumerate(stages, 1)}


def _file(machine: Row, out: Path | None) -> Path:
    date = re.sub(r"[^0-9T]", "", machine["date"].split("+")[0])
    path = require_absent(out or Path("bench/results") / slug(machine["device"]) / f"{date}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)
    return path


def _resume(machine: Row, path: Path) -> tuple[Row, DoneJobs]:
    """Return a row on the continuing machine, and the finished jobs of the file."""
    before = read_run(path).machine
    for what in ("device", "torch"):
        if before.get(what) != machine[what]:
            raise UserError(f"{path} cannot be resumed here: its {what} is {before.get(what)}, and here it is {machine[what]}")
    return {"case": "resumed", **{name: machine.get(name) for name in ("date", "commit", "driver")}}, prepare_resume(path)


def _run(
    stages: Mapping[str, Stage], config: BenchConfig | TuneConfig, device: torch.device, seconds: float,
    console: Console | None, resume: Path | None = None,
) -> Path:  # fmt: skip
    console, machine = console or _console(), describe(device)
    is_gpu, done = device.type == "cuda", frozenset()
    if resume is None:
        path, first = _file(machine, config.out), machine
    else:
        path = resume.resolve()
        first, done = _resume(machine, path)
    stages = {name: stage for name, stage in stages.items() if (name, None) not in done}
    workers = partial(run_in_workers, tune=config) if isinstance(config, TuneConfig) else run_in_workers
    run = workers if is_gpu else run_here
    with _Results(path) as results, closing(run(stages, device, _ends(stages, is_gpu, seconds), done)) as events:
        results.keep({"stage": "machine", **first})
        lacking = _record(events, results, console)
    console.print(f"{machine['device']}, torch {machine['torch']}: wrote {path}", highlight=False, markup=False)
    if lacking and isinstance(config, BenchConfig):
        minutes = [f"--minutes {config.minutes:g}"] * (config.minutes is not None)
        command = " ".join(["tilewright bench", *config.stages, *minutes, f"--resume {path}"])
        console.print(f"no time left for {lacking} jobs: continue with `{command}`", highlight=False, markup=False)
    return path


def run_bench(config: BenchConfig, console: Console | None = None) -> Path:
    """Run the stages, print a line per job and a table per stage, and return the path of the results file.

    On a GPU the stages run in a worker process, which is replaced if a kernel hangs, kills it, or breaks its context.
    """
    device = resolve_device(config.device)
    stages = chosen_stages(config.asked, device.type == "cuda")
    seconds = math.inf
    if config.minutes is not None:
        seconds = 60 * config.minutes
    elif "all" in config.stages:
        is_gpu = device.type == "cuda"
        seconds = sum(_share(stage, is_gpu) for stage in stages.values()) + STARTING_S * is_gpu
    return _run(stages, config, device, seconds, console, config.resume)


def run_tune(config: TuneConfig, console: Console | None = None) -> Path:
    """Tune on the local GPU, print the measurements, and return the path of the results file."""
    device = resolve_device(config.device)
    if device.type != "cuda":
        raise UserError(f"cannot tune on device {device}: tuning times kernels on an NVIDIA GPU")
    return _run({"tune": tune_stage(config)}, config, device, math.inf, console)
