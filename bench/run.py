"""The bench's stages in turn; every row is on disk before the next is measured."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..files import require_absent
from ..kernels.inspect import ARCHITECTURES, all_cases, inspect
from ..train.loop import resolve_device
from .attention import bench_attention
from .kernels import Ceilings, bench_kernels
from .machine import copy_ceiling, describe, matmul_ceiling
from .tokenizer import LONG, bench_tokenizer
from .training import bench_training
from .tune import TuneConfig, tune_attention

Rows = Iterator[dict[str, Any]]
Stage = Callable[[torch.device], Rows]


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    stage: tyro.conf.Positional[
        Literal["all", "tests", "inspect", "kernels", "attention", "training", "tokenizer", "tokenizer-long"]
    ] = "all"
    """tests: the GPU-marked ones; inspect: registers, spills and shared memory of every kernel, without a GPU; others time.

    tokenizer-long takes an hour: texts of 100 MB, lines without a break of 10 and 20 MB; it is not part of all."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    out: Path | None = None
    """File of the results, JSON lines; by default bench/results/DEVICE/DATE.jsonl."""


def _tests(device: torch.device) -> Rows:
    folder = Path(__file__).parent.parent / "tests"
    if device.type != "cuda" or not folder.is_dir():
        yield {
            "case": "GPU-marked tests",
            "not_measured": "no NVIDIA GPU" if device.type != "cuda" else "installed without tests",
        }
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(folder)]
    outcome = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    tail = outcome.stdout.strip().splitlines()[-1:] or [outcome.stderr.strip()[-200:]]
    yield {"case": "GPU-marked tests", "variant": "passed" if outcome.returncode == 0 else "FAILED", "summary": tail[0]}


def _ceiling_rows(ceilings: Ceilings) -> Rows:
    yield {"case": "ceiling", "variant": "copy of 1 GiB", "gb_per_s": ceilings.copy / 1e9}
    yield {"case": "ceiling", "variant": "bfloat16 product 8192^3", "tflop_per_s": ceilings.matmul / 1e12}


def _kernels(device: torch.device) -> Rows:
    if device.type != "cuda":
        yield {"case": "kernels", "not_measured": "no NVIDIA GPU"}
        return
    ceilings = Ceilings(copy_ceiling(device), matmul_ceiling(device))
    yield from _ceiling_rows(ceilings)
    yield from bench_kernels(device, ceilings)


def _attention(device: torch.device) -> Rows:
    if device.type != "cuda":
        left_out = "attention and decoding beside SDPA's backends, flex_attention and flash-attn"
        yield {"case": left_out, "not_measured": "no NVIDIA GPU"}
        return
    ceilings = Ceilings(copy_ceiling(device), matmul_ceiling(device))
    yield from _ceiling_rows(ceilings)
    yield from bench_attention(device, ceilings)


def _inspect(device: torch.device) -> Rows:
    for architecture in ARCHITECTURES:
        for case in all_cases(architecture):
            report = asdict(inspect(case, architecture))
            yield {"case": report.pop("name"), "variant": report.pop("architecture"), **report}


def _training(device: torch.device) -> Rows:
    presets = ("tinystories-17m", "gpt2-small", "gpt2-xl") if device.type == "cuda" else ("stories-cpu",)
    yield from bench_training(device, presets)


def _tokenizer(device: torch.device) -> Rows:
    yield from bench_tokenizer()


def _tokenizer_long(device: torch.device) -> Rows:
    yield from bench_tokenizer(LONG)


STAGES: dict[str, Stage] = {
    "tests": _tests,
    "inspect": _inspect,
    "kernels": _kernels,
    "attention": _attention,
    "training": _training,
    "tokenizer": _tokenizer,
    "tokenizer-long": _tokenizer_long,
}


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("share_of_roofline", "share_of_matmul", "mfu", "occupancy"):
        return f"{value:.1%}"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in columns:
        is_text = name in ("case", "variant")
        table.add_column(name.replace("_", " "), justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows:
        table.add_row(*(_text(name, row.get(name)) for name in columns))
    return table


def _run(stages: Mapping[str, Stage], device: torch.device, out: Path | None, console: Console | None) -> Path:
    # In a file a table may be wider than the 80 columns that are assumed there.
    console = console or Console(width=None if sys.stdout.isatty() else 180)
    if device.type == "cuda":
        # Events and the clearing of the L2 cache go by the current device.
        torch.cuda.set_device(device)
    machine = describe(device)
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    date = re.sub(r"[^0-9T]", "", machine["date"].split("+")[0])
    path = require_absent(out or Path("bench/results") / slug / f"{date}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x") as file:

        def keep(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        keep({"stage": "machine", **machine})
        for stage, measure in stages.items():
            rows = []
            for row in measure(device):
                keep({"stage": stage, **row})
                rows.append(row)
            # Reasons are long, figures many: in one table neither could be read.
            left_out = [row for row in rows if "not_measured" in row]
            measured = [row for row in rows if "not_measured" not in row]
            for title, part in ((stage, measured), (f"{stage}: not measured", left_out)):
                if part:
                    console.print(_table(title, part))
    console.print(f"{machine['device']}, torch {machine['torch']}: wrote {path}", highlight=False)
    return path


def run_bench(config: BenchConfig, console: Console | None = None) -> Path:
    """Run the stages, show a table of each, and return the file that holds every row."""
    names = [name for name in STAGES if name != "tokenizer-long"] if config.stage == "all" else [config.stage]
    return _run({name: STAGES[name] for name in names}, resolve_device(config.device), config.out, console)


def run_tune(config: TuneConfig, console: Console | None = None) -> Path:
    """Tune on the GPU at hand, show what was measured, and return the file that holds it."""
    device = resolve_device(config.device)
    if device.type != "cuda":
        raise UserError(f"device {device} cannot be tuned for: an NVIDIA GPU is needed, whose kernels are timed")
    return _run({"tune": lambda device: tune_attention(config, device)}, device, config.out, console)
