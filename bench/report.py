"""The report: one page of tables and plots from all committed results, and short tables for the README and the docs."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from .figures import columns, heading, tables, text
from .headlines import headlines
from .jobs import Row, lacks_time
from .options import ReportConfig
from .plots import PLOTS, draw_plots
from .predictions import ASSUMED, NOT_MEASURED, attention_predictions, bandwidth_predictions, fitted_factors
from .readme import replace_block
from .results import Run, newest, read_runs
from .run import slug
from .stages import STAGES

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
INTRODUCTION = """\
# Bench results

`tilewright bench report` writes this page from the files in `bench/results/`, which contain every row; docs/method.md
describes the method. Times are medians with the 20th and 80th percentiles. Shares refer to the roofline from the ceilings of
the same run, and to the datasheet's. The page shows the newest measurement of each case. GB is 1e9 bytes.
"""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[str]:
    """Return the lines of a Markdown table; missing values stay empty."""
    names = columns(rows) if names is None else names
    lines = [f"| {' | '.join(heading(name) for name in names)} |"]
    words = ("case", "variant", "device", "suspicious", "busiest", "waits_for")
    lines.append("|" + "|".join("---" if name in words else "---:" for name in names) + "|")
    lines += [f"| {' | '.join(_cell(text(name, row.get(name))) for name in names)} |" for row in rows]
    return lines


def _inspected(rows: Iterable[Row]) -> list[Row]:
    """Summarize thousands of compilations as one row per architecture."""
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
    # A case that the newest run skipped can stand above with its older measurement.
    measured = [f"{row.get('case')} " for _, rows in found for row in rows]
    left_out = [
        row
        for row in found[0][0].stage(name)
        if "not_measured" in row and not (lacks_time(row) and any(case.startswith(f"{row['case']} ") for case in measured))
    ]
    if left_out:
        yield from (f"<details><summary>{NOT_MEASURED}: {len(left_out)}</summary>", "")
        yield from (*table(left_out, ["case", "variant", "not_measured"]), "", "</details>", "")


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


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
    """Return the page of all runs, oldest first; replace the plots in `folder`/plots."""
    for picture in (folder / "plots").glob("*.svg"):
        picture.unlink()
    lines = [INTRODUCTION]
    if not any(run.is_gpu for run in runs):
        lines += ["## NVIDIA GPUs", "", f"There is no GPU run yet, so these are {NOT_MEASURED}:", ""]
        lines += [f"- {name}: {stage.what}" for name, stage in STAGES.items() if not stage.on_any_machine]
        lines += [f"- the plot of {name}" for name in PLOTS] + [""]
    devices = sorted(
        {run.device for run in runs}, key=lambda device: (not any(r.is_gpu for r in runs if r.device == device), device)
    )
    for device in devices:
        lines += _device_lines(device, [run for run in runs if run.device == device], folder)
    if predicted := attention_predictions(runs):
        lines += ["## Predicted and measured", "", ASSUMED, "", *table(predicted), ""]
        if fitted := fitted_factors(predicted):
            lines += [
                "Factors of the model (`CALIBRATION` in bench/loop_model.py), and those that fit:",
                "",
                *table(fitted),
                "",
            ]
    if bandwidths := bandwidth_predictions(runs):
        lines += ["Shares of the memory bandwidth; the measured ones are relative to a copy:", "", *table(bandwidths), ""]
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


def block(runs: Sequence[Run], full: bool) -> str:
    """Return the table of headlines with its markers: the measured ones or, if `full`, all of them and the predictions."""
    lines = [line for line in headlines(runs) if line.result or full]
    sources = list(dict.fromkeys(line.where for line in lines if line.where))
    rows = [
        f"| {line.what} | {_cell(line.result) or NOT_MEASURED} | {sources.index(line.where) + 1 if line.where else ''} |"
        for line in lines
    ]
    notes = [f"{i}. {source}" for i, source in enumerate(sources, 1)]
    predicted = attention_predictions(runs) if full else []
    below = ["", "## Predicted", "", ASSUMED, "", *table(predicted)] if predicted else []
    return "\n".join([BEGIN, "| what | measured | on |", "|---|---|---|", *rows, "", *notes, *below, END])


def refresh(path: Path, runs: Sequence[Run], full: bool) -> bool:
    """Write the block into a page between its markers; return False without a change if the markers are missing."""
    page = path.read_text() if path.is_file() else ""
    if BEGIN not in page:
        return False
    write_text(path, replace_block(page, block(runs, full), BEGIN, END))
    return True


def run_report(config: ReportConfig) -> Path:
    """Write the page and its plots from all results, refresh the tables of README and docs, and return the path of the page."""
    runs = read_runs(config.results)
    if not runs:
        raise UserError(f"{config.results} holds no results: run `tilewright bench` first")
    if config.readme is not None and BEGIN not in config.readme.read_text():
        raise UserError(f"{config.readme} has no line {BEGIN!r}: add it, and {END!r}, where the table belongs")
    write_text(config.out, render(runs, config.out.parent))
    tables = ((config.readme or Path("README.md"), False), (config.overview, True))
    pages = [str(path) for path, full in tables if refresh(path, runs, full)]
    refreshed = f"; refreshed the tables in {', '.join(pages)}" if pages else ""
    print(f"wrote {config.out} from {len(runs)} runs{refreshed}")
    return config.out
