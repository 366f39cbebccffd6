"""The bench's stages in turn; every row is on disk before the next is measured."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from ..files import require_absent
from ..train.device import prepare_allocator, resolve_device
from .ceilings import Device
from .figures import columns, heading, tables, text
from .jobs import DeviceLost, Job, Row, Rows, run_jobs
from .machine import describe, state_row
from .results import settled
from .stages import STAGES, Stage, chosen_stages
from .tune import TuneConfig, tune_attention

StageName = Literal[
    "all", "machine", "ceilings", "tests", "kernels", "attention", "training", "generation", "memory", "accounting", "inspect",
    "overhead", "tokenizer", "tokenizer-long",
]  # fmt: skip
# More are in the file only: nobody reads so many in a console.
SHOWN_ROWS = 120


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    stages: tyro.conf.Positional[tuple[StageName, ...]] = ("all",)
    """all has 9 minutes on a GPU and leaves out what does not fit; a stage that is named has the time that it takes.

    What is timed stands beside peers and bounds. machine: clocks, throttling, other processes; ceilings: of a copy and of
    products; tests: the GPU-marked ones; memory: peaks, predicted and measured; accounting: FLOPs by formula and as counted;
    inspect: what the compiler made of every kernel, without a GPU; overhead: what the training loop adds to a step;
    tokenizer-long takes an hour and is no part of all."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    out: Path | None = None
    """File of the results, JSON lines; by default bench/results/DEVICE/DATE.jsonl."""

    def __post_init__(self) -> None:
        for name in self.stages:
            if name not in get_args(StageName):
                raise UserError(f"stage {name!r} is unknown: choose of {', '.join(get_args(StageName))}")


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
    """The file of a run, one row a line, each on disk as soon as it is known; processes may take turns to add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a")

    def keep(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> "_Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _rows(stage: Stage, on: Device, deadline: float, begun: int) -> Rows:
    if stage.cpu_s is None and on.device.type != "cuda":
        yield {"case": stage.what, "not_measured": "no NVIDIA GPU"}
        return
    try:
        jobs = islice(stage.jobs(on), begun, None)
    except Exception as error:  # no ceilings, for one, where others hold all of the memory
        yield {"case": stage.what, "not_measured": f"{type(error).__name__}: {error}"[:300]}
        return
    yield from run_jobs(jobs, on.device, deadline)


def _measure(
    results: _Results, stages: Mapping[str, Stage], device: torch.device, ends: Mapping[str, float], console: Console,
    begun: int = 0,
) -> None:  # fmt: skip
    """Run the stages, each until its end of `ends` (of time.monotonic); `begun` jobs of the first one have had their turn.

    Should the GPU be lost to this process, a new one takes its place and goes on with what is left.
    """
    on, left = Device(device), [*stages]
    if device.type == "cuda":
        prepare_allocator(device)
        # Events and the clearing of the L2 cache go by the current device, which is what `cuda` without a number means.
        if device.index is not None:
            torch.cuda.set_device(device)
    while left:
        name, lost = left[0], None
        rows = []
        try:
            for row in _rows(stages[name], on, ends[name], begun):
                results.keep({"stage": name, **row})
                rows.append(row)
        except DeviceLost as error:
            lost = error
        if device.type == "cuda" and name != "machine" and lost is None:
            # While it is still warm: what a stage was slowed down by shows in it.
            results.keep({"stage": "machine", **state_row(device, f"after {name}")})
        _show(console, name, settled(rows))
        if lost is not None and name in STAGES:
            _in_a_new_process(results.path, left, device, ends, begun + lost.begun)
            return
        begun = 0
        left.pop(0)


def _go_on(path: str, names: Sequence[str], device: str, ends: Mapping[str, float], begun: int) -> None:
    console = _console()
    with _Results(Path(path)) as results:
        _measure(results, {name: STAGES[name] for name in names}, torch.device(device), ends, console, begun)
    console.print(f"wrote {path}", highlight=False, markup=False)


def _in_a_new_process(path: Path, names: Sequence[str], device: torch.device, ends: Mapping[str, float], begun: int) -> None:
    """Become a process that goes on: one beside it would not have the memory that a broken context holds to the end."""
    arguments = json.dumps([str(path), names, str(device), ends, begun])
    program = f"import json, sys; from {__name__} import _go_on; _go_on(*json.loads(sys.argv[1]))"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-c", program, arguments])


def _run(stages: Mapping[str, Stage], device: torch.device, out: Path | None, timed: bool, console: Console | None) -> Path:
    console, machine = console or _console(), describe(device)
    date = re.sub(r"[^0-9T]", "", machine["date"].split("+")[0])
    path = require_absent(out or Path("bench/results") / slug(machine["device"]) / f"{date}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a stage leaves of its time goes to the next.
    seconds = (stage.gpu_s if device.type == "cuda" else stage.cpu_s or 0 for stage in stages.values())
    ends = accumulate(seconds, initial=time.monotonic())
    next(ends)
    path.touch(exist_ok=False)
    with _Results(path) as results:
        results.keep({"stage": "machine", **machine})
        _measure(results, stages, device, {name: next(ends) if timed else math.inf for name in stages}, console)
    console.print(f"{machine['device']}, torch {machine['torch']}: wrote {path}", highlight=False, markup=False)
    return path


def run_bench(config: BenchConfig, console: Console | None = None) -> Path:
    """Run the stages, show a table of each, and return the file that holds every row.

    After a kernel that breaks the GPU's context the process is replaced by one that goes on, and this does not return.
    """
    device = resolve_device(config.device)
    stages = chosen_stages(config.stages, device.type == "cuda")
    return _run(stages, device, config.out, "all" in config.stages, console)


def run_tune(config: TuneConfig, console: Console | None = None) -> Path:
    """Tune on the GPU at hand, show what was measured, and return the file that holds it."""
    device = resolve_device(config.device)
    if device.type != "cuda":
        raise UserError(f"device {device} cannot be tuned for: an NVIDIA GPU is needed, whose kernels are timed")
    job = Job("tune", partial(tune_attention, config, device))
    return _run({"tune": Stage("attention's launches", lambda on: iter([job]), 0)}, device, config.out, False, console)
