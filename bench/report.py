"""The report: all committed results as one page of tables and pictures, and the README's few lines of it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from .attention_peers import variant_of
from .figures import columns, heading, tables, text
from .headlines import headlines
from .jobs import Row
from .plots import PLOTS, draw_plots
from .readme import replace_block
from .results import Run, read_runs
from .run import slug
from .stages import STAGES
from .static_model import PREDICTED

ASSUMED = """\
By the static model of the kernels' machine code, which CONTRIBUTING.md describes, for an H100 of 132 multiprocessors at
1.83 GHz. It takes loads to be in time. One factor for each form stands for power and clocks."""
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOT_MEASURED = "not measured"
# Stages whose rows say something only together.
OF_ONE_RUN = ("machine", "ceilings", "tests", "accounting", "inspect", "model")
INTRODUCTION = """\
# What the bench has measured

Written by `tilewright bench report` from the files under `bench/results/`, which hold every row; CONTRIBUTING.md says how they
are measured. Times are medians, beside them the 20th and the 80th percentile; shares are those of the roofline that the
ceilings of the same run draw, and of the datasheet's. Each case is shown as it was measured last. GB is 1e9 bytes.
"""


@dataclass(frozen=True)
class ReportConfig:
    """What to report on."""

    results: Path = Path("bench/results")
    """Folder of the results, a folder a device."""
    out: Path = Path("bench/RESULTS.md")
    """The page; its pictures go to the folder plots beside it."""
    readme: Path = Path("README.md")
    """Where the table between `<!-- bench:begin -->` and `<!-- bench:end -->` is refreshed."""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[str]:
    """Return the lines of a Markdown table of rows; what a row does not have stays empty."""
    names = columns(rows) if names is None else names
    lines = [f"| {' | '.join(heading(name) for name in names)} |"]
    words = ("case", "variant", "device", "suspicious", "busiest", "waits_for")
    lines.append("|" + "|".join("---" if name in words else "---:" for name in names) + "|")
    lines += [f"| {' | '.join(_cell(text(name, row.get(name))) for name in names)} |" for row in rows]
    return lines


def _inspected(rows: Iterable[Row]) -> list[Row]:
    """Return a row for each architecture: thousands of compilations are nobody's reading."""
    by_architecture: dict[str, list[Row]] = {}
    for row in rows:
        by_architecture.setdefault(str(row.get("variant")), []).append(row)
    return [
        {
            "case": architecture,
            "compilations": len(group),
            "that_spill": sum(row.get("spilled_bytes", 0) > 0 for row in group),
            "most_registers": max(row.get("registers", 0) for row in group),
            "most_shared_bytes": max(row.get("shared_bytes", 0) for row in group),
        }
        for architecture, group in by_architecture.items()
    ]


def _stage_lines(name: str, found: Sequence[tuple[Run, list[Row]]], folder: Path) -> Iterator[str]:
    yield from (f"### {name}", "")
    for run, rows in found:
        yield from (f"{run.provenance}: [{run.path.name}]({_link(run.path, folder)})", "")
        for title, part in tables(_inspected(rows) if name == "inspect" else rows).items():
            yield from ([f"{title[:1].upper()}{title[1:]}:", ""] if title else [])
            yield from (*table(part), "")
    left_out = [row for row in found[0][0].stage(name) if "not_measured" in row]
    if left_out:
        yield from (f"<details><summary>{NOT_MEASURED}: {len(left_out)}</summary>", "")
        yield from (*table(left_out, ["case", "variant", "not_measured"]), "", "</details>", "")


def predictions(runs: Sequence[Run]) -> list[Row]:
    """Return what the static model predicted last, each beside what a GPU measured of it last, or not."""
    predicted = [row for _, rows in newest(runs, "model") for row in rows if row.get("table") == PREDICTED]
    measured: dict[tuple[Any, Any], tuple[Run, Row]] = {}
    for run, rows in reversed(newest([run for run in runs if run.is_gpu], "attention")):
        measured |= {(row.get("case"), row.get("variant")): (run, row) for row in rows}
    found = []
    for row in predicted:
        run, one = measured.get((row.get("case"), variant_of(str(row.get("variant")))), (None, {}))
        beside = {"measured_ms": one.get("p50_ms"), "measured_tflop_per_s": one.get("tflop_per_s")}
        found.append({**row, **beside, "device": run.device if run else NOT_MEASURED})
    return found


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def newest(runs: Sequence[Run], stage: str) -> list[tuple[Run, list[Row]]]:
    """Return what `runs`, which are oldest first, measured in a stage, newest first; each case as it was measured last.

    So that a run which left cases out does not hide those of an earlier one.
    """
    found: list[tuple[Run, list[Row]]] = []
    seen: set[Any] = set()
    for run in reversed(runs):
        measured = [row for row in run.stage(stage) if "not_measured" not in row]
        new = [row for row in measured if row.get("case") not in seen]
        if new:
            found.append((run, new))
        if found and stage in OF_ONE_RUN:
            break
        seen |= {row.get("case") for row in measured if not row.get("preliminary")}
    return found


def _device_lines(device: str, runs: Sequence[Run], folder: Path) -> Iterator[str]:
    yield from (f"## {device}", "")
    others = [str(row.get("stage")) for run in runs for row in run.rows if row.get("stage") not in STAGES]
    found = {name: rows for name in (*STAGES, *dict.fromkeys(others)) if (rows := newest(runs, name))}
    for name, of_runs in found.items():
        yield from _stage_lines(name, of_runs, folder)
    rows = {name: [row for _, part in of_runs for row in part] for name, of_runs in found.items()}
    plots = draw_plots(rows, folder / "plots", slug(device))
    for name, path in plots.items():
        yield from (f"![{name}]({_link(path, folder)})", "")
    missing = [name for name in STAGES if name not in found]
    if any(run.is_gpu for run in runs):
        missing += [f"plot of {name}" for name in PLOTS if name not in plots]
    if missing:
        yield from (f"Here {NOT_MEASURED}: {', '.join(missing)}.", "")


def render(runs: Sequence[Run], folder: Path) -> str:
    """Return the page of all runs, oldest first; its pictures are drawn to `folder`/plots, where no other is left."""
    for picture in (folder / "plots").glob("*.svg"):
        picture.unlink()
    lines = [INTRODUCTION]
    if not any(run.is_gpu for run in runs):
        lines += ["## NVIDIA GPUs", "", f"No run on a GPU is here yet, so these are {NOT_MEASURED}:", ""]
        lines += [f"- {name}: {stage.what}" for name, stage in STAGES.items() if not stage.on_any_machine]
        lines += [f"- the plot of {name}" for name in PLOTS] + [""]
    devices = sorted(
        {run.device for run in runs}, key=lambda device: (not any(r.is_gpu for r in runs if r.device == device), device)
    )
    for device in devices:
        lines += _device_lines(device, [run for run in runs if run.device == device], folder)
    if beside := predictions(runs):
        lines += ["## Predicted and measured", "", ASSUMED, "", *table(beside), ""]
    lines += ["## All runs", "", "| file | device | date | commit | stages |", "|---|---|---|---|---|"]
    for run in runs:
        stages = ", ".join(dict.fromkeys(str(row.get("stage")) for row in run.rows if "not_measured" not in row))
        cells = (
            f"[{run.path.name}]({_link(run.path, folder)})",
            run.device,
            run.date,
            str(run.machine.get("commit", "")),
            stages,
        )
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def readme_block(runs: Sequence[Run]) -> str:
    """Return what README.md says of all runs, between its markers."""
    lines = headlines(runs)
    sources = list(dict.fromkeys(line.where for line in lines if line.where))
    rows = [
        f"| {line.what} | {_cell(line.result) or NOT_MEASURED} | {sources.index(line.where) + 1 if line.where else ''} |"
        for line in lines
    ]
    notes = [f"{i}. {source}" for i, source in enumerate(sources, 1)]
    return "\n".join([BEGIN, "| what | measured | on |", "|---|---|---|", *rows, "", *notes, END])


def refresh_readme(path: Path, runs: Sequence[Run]) -> bool:
    """Put the table into the README between its markers; return False, and leave it, where it has none."""
    readme = path.read_text() if path.is_file() else ""
    if BEGIN not in readme:
        return False
    write_text(path, replace_block(readme, readme_block(runs), BEGIN, END))
    return True


def run_report(config: ReportConfig) -> Path:
    """Write the page and its pictures from all results, refresh the README's table, and return the page's path."""
    runs = read_runs(config.results)
    if not runs:
        raise UserError(f"{config.results} holds no results: make some with `tilewright bench`")
    write_text(config.out, render(runs, config.out.parent))
    refreshed = f"; refreshed the table in {config.readme}" if refresh_readme(config.readme, runs) else ""
    print(f"wrote {config.out} from {len(runs)} runs{refreshed}")
    return config.out
