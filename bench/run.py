"""The bench's stages in turn; every row is on disk as soon as it is known."""

import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..files import require_absent
from ..train.device import resolve_device
from .figures import columns, heading, tables, text
from .jobs import Row, lacks_time
from .machine import describe
from .results import mark, open_locked, read_run, settled, take_up
from .stages import Stage, chosen_stages, tune_stage
from .tune import TuneConfig
from .watch import Event, Had
from .worker import run_here, run_in_workers

StageName = Literal[
    "all", "machine", "ceilings", "tests", "kernels", "attention", "training", "generation", "memory", "accounting", "inspect",
    "model", "overhead", "tokenizer", "tokenizer-long",
]  # fmt: skip
MAX_MINUTES = 10_000
# Until a worker has imported PyTorch and a GPU has answered: the first stage would have no time left.
STARTING_S = 10.0
# More are in the file only: nobody reads so many in a console.
SHOWN_ROWS = 120


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    stages: tyro.conf.Positional[tuple[StageName, ...]] = ("all",)
    """all has 9 minutes on a GPU and leaves out what does not fit; without all, named stages have the time that they take.

    What is timed stands beside peers and bounds. machine: clocks, throttling, other processes; ceilings: of a copy and of
    products; tests: the GPU-marked ones; memory: peaks, predicted and measured; accounting: FLOPs by formula and as counted;
    inspect: what the compiler made of every kernel, without a GPU; model: what limits each by its machine code, the same as
    inspect --model; overhead: what the training loop adds to a step; tokenizer-long takes an hour and is no part of all."""
    model: bool = False
    """With inspect: show what limits each kernel on Hopper, by a static model of its machine code, instead of its registers."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    out: Path | None = None
    """File of the results, JSON lines; by default bench/results/DEVICE/DATE.jsonl."""
    minutes: float | None = None
    """Time of all stages together, each with its share; what does not fit is left out. On a GPU a job has at most 2 minutes, a
    few have more."""
    resume: Path | None = None
    """File of an earlier run here that goes on: jobs that have had their turn are not run again."""

    def __post_init__(self) -> None:
        for name in self.stages:
            if name not in get_args(StageName):
                raise UserError(f"stage {name!r} is unknown: choose of {', '.join(get_args(StageName))}")
        if self.model and "inspect" not in self.stages:
            raise UserError(f"--model belongs to the stage inspect: the stages are {', '.join(self.stages)}")
        if self.minutes is not None and not 0 < self.minutes <= MAX_MINUTES:
            raise UserError(f"minutes is {self.minutes:g}: it must be above 0, and at most {MAX_MINUTES:,}")
        if self.out is not None and self.resume is not None:
            raise UserError("--resume names the file that goes on: leave --out away")

    @property
    def asked(self) -> tuple[str, ...]:
        """The stages that run."""
        return tuple("model" if self.model and name == "inspect" else name for name in self.stages)


def _table(title: str, rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    shown = columns(rows)
    for name in shown:
        is_text = name in ("case", "variant")
        table.add_column(heading(name), justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows:
        # An error's message may hold what looks like markup.
        table.add_row(*(escape(text(name, row.get(name))) for name in shown))
    return table


def _show(console: Console, stage: str, rows: list[Row]) -> None:
    # Reasons are long, figures many: in one table neither could be read.
    left_out = [row for row in rows if "not_measured" in row]
    measured = tables(row for row in rows if "not_measured" not in row)
    parts = {f"{stage}: {name}" if name else stage: part for name, part in measured.items()}
    if left_out:
        parts[f"{stage}: not measured"] = [*left_out]
    for title, part in parts.items():
        if len(part) > SHOWN_ROWS:
            console.print(f"{title}: {len(part):,} rows, in the file only", highlight=False)
        else:
            console.print(_table(title, part))


def _console() -> Console:
    # In a file a table may be wider than the 80 columns that are assumed there.
    return Console(width=None if sys.stdout.isatty() else 180)


def slug(device: str) -> str:
    """Return a device's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


class _Results:
    """The file of a run, one row a line, each on disk as soon as it is known."""

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
    """Return what came of a job in few words: our first time, or another's, and what was not measured."""
    measured = [row for row in settled(rows) if "not_measured" not in row]
    timed = sorted((row for row in measured if "p50_ms" in row), key=lambda row: row.get("variant") != "tilewright")
    parts = [str(row["summary"]) for row in measured if row.get("summary")]
    if timed:
        what = f"{str(timed[0]['case']).removeprefix(case)} {timed[0].get('variant', '')}".strip()
        parts = [f"{text('p50_ms', timed[0]['p50_ms'])} ms {what}".strip()]
    reasons = [str(row["not_measured"]) for row in rows if "not_measured" in row]
    # The job's own failure has no variant.
    own = [str(row["not_measured"]) for row in rows if "not_measured" in row and "variant" not in row]
    parts += own[-1:] or ([f"{len(reasons)} not measured"] if reasons else [])
    return "; ".join(parts or [f"{len(measured)} rows"])


def _record(events: Iterable[Event], results: _Results, console: Console) -> int:
    """Keep every row, say what came of every job, show a table of each stage; return how many jobs no time was left for."""
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
            said = f"{stage}: {event['end']}: {_summary(event['end'], of_job)} ({time.monotonic() - began:.0f} s)"
            # Errors have lines.
            console.print(" ".join(said.split()), highlight=False, markup=False)
        elif "over" in event:
            if event["complete"]:
                results.keep(mark(stage, None, ended=True))
            _show(console, stage, settled(of_stages.pop(stage, [])))
    return lacking


def _share(stage: Stage, is_gpu: bool) -> float:
    return stage.gpu_s if is_gpu else stage.cpu_s or 0


def _ends(stages: Mapping[str, Stage], is_gpu: bool, seconds: float) -> dict[str, float]:
    """Return when the time of each stage is over, of `seconds` in all; what a stage leaves of its time goes to the next."""
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


def _taken_up(machine: Row, path: Path) -> tuple[Row, Had]:
    """Return the row that says who goes on with a file, and what has had its turn there."""
    before = read_run(path).machine
    for what in ("device", "torch"):
        if before.get(what) != machine[what]:
            raise UserError(f"{path} cannot go on here: its {what} is {before.get(what)}, that of this run {machine[what]}")
    return {"case": "went on", **{name: machine.get(name) for name in ("date", "commit", "driver")}}, take_up(path)


def _run(
    stages: Mapping[str, Stage], config: BenchConfig | TuneConfig, device: torch.device, seconds: float,
    console: Console | None, resume: Path | None = None,
) -> Path:  # fmt: skip
    console, machine = console or _console(), describe(device)
    is_gpu, had = device.type == "cuda", frozenset()
    if resume is None:
        path, first = _file(machine, config.out), machine
    else:
        path = resume.resolve()
        first, had = _taken_up(machine, path)
    stages = {name: stage for name, stage in stages.items() if (name, None) not in had}
    workers = partial(run_in_workers, tune=config) if isinstance(config, TuneConfig) else run_in_workers
    run = workers if is_gpu else run_here
    with _Results(path) as results, closing(run(stages, device, _ends(stages, is_gpu, seconds), had)) as events:
        results.keep({"stage": "machine", **first})
        lacking = _record(events, results, console)
    console.print(f"{machine['device']}, torch {machine['torch']}: wrote {path}", highlight=False, markup=False)
    if lacking and isinstance(config, BenchConfig):
        said = " ".join(["tilewright bench", *config.stages] + [f"--minutes {config.minutes:g}"] * (config.minutes is not None))
        console.print(f"no time was left for {lacking} jobs: `{said} --resume {path}` goes on", highlight=False, markup=False)
    return path


def run_bench(config: BenchConfig, console: Console | None = None) -> Path:
    """Run the stages, say what came of each job, show a table of each stage, and return the file that holds every row.

    On a GPU they run in a process of its own, which a new one replaces where a kernel hangs, kills it, or breaks its context.
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
    """Tune on the GPU at hand, show what was measured, and return the file that holds it."""
    device = resolve_device(config.device)
    if device.type != "cuda":
        raise UserError(f"device {device} cannot be tuned for: an NVIDIA GPU is needed, whose kernels are timed")
    return _run({"tune": tune_stage(config)}, config, device, math.inf, console)
