"""Run a sweep: one training run for each point of a grid of options."""

import dataclasses
import gc
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import DivergedError, UserError
from ...files import write_text
from ..bits_per_byte import finite
from ..config import TrainConfig, holds_run, load_config, save_config, with_options
from ..extension import check_same_run
from ..plot import can_plot
from ..run import train
from .options import SweepConfig
from .plot import plot_sweep
from .result import SweepPoint, SweepResult, name_of

BASE_FILE, RESULT_FILE = "base.json", "sweep.json"
FORMAT = "tilewright-sweep-1"


def parse_grid(grid: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each option in `grid`, parsed as JSON if possible, else as strings; malformed: a `UserError`."""
    axes: dict[str, list[Any]] = {}
    for entry in grid:
        name, equals, text = entry.partition("=")
        if not (name and equals and text):
            raise UserError(f"grid contains {entry!r}: expected an option and its values, such as optimizer.lr=1e-4,3e-4")
        name = name.replace("-", "_")
        if name == "out":
            raise UserError("grid contains out: every point gets its own folder in the sweep's --out")
        if name in axes:
            raise UserError(f"grid contains {name} twice: expected all its values in one entry")
        axes[name] = _values(text)
    if not axes:
        raise UserError("grid is empty: expected an option and its values, such as optimizer.lr=1e-4,3e-4")
    return axes


def _values(text: str) -> list[Any]:
    try:
        return json.loads(f"[{text}]")
    except ValueError:
        words = text.split(",")
    return [_value(word) for word in words]


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(word, word)


def _configs(base: TrainConfig, axes: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], TrainConfig]]:
    """Return the settings and the configuration of every point; raise a `UserError` for an invalid one before any run."""
    points, names = [], set()
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        name = re.sub(r"[^\w.=,+-]", "_", name_of(settings))
        if name in names:
            raise UserError(f"grid contains the point {name} twice: expected different values")
        names.add(name)
        options = {"out": str(base.out / name), **settings}
        lr = settings.get("optimizer.lr")
        if isinstance(lr, int | float):
            final_lr = min(base.optimizer.final_lr / base.optimizer.lr * lr, lr)
            options.setdefault("optimizer.final_lr", final_lr)
        points.append((settings, with_options(base, options)))
    return points


def _open_sweep(base: TrainConfig) -> dict[str, SweepPoint]:
    """Create the sweep's folder, or check that it contains the same sweep; return its finished points by run name."""
    out = base.out
    stored = out / BASE_FILE
    if not stored.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a sweep: choose another folder with --out")
    if not any(holds_run(run) for run in out.glob("*/")):
        save_config(base, stored)
        return {}
    check_same_run(load_config(stored), base)
    path = out / RESULT_FILE
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        points = [SweepPoint(**point) for point in document["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the result of a sweep ({error}): remove it to run its points again") from error
    return {point.run: point for point in points}


def _run_point(settings: dict[str, Any], config: TrainConfig) -> SweepPoint | None:
    """Train or resume one point; return None if a signal stopped it."""
    run = config.out
    begun = holds_run(run)
    if not begun:
        # Remove the files of a run that was killed before its first checkpoint.
        shutil.rmtree(run, ignore_errors=True)
    try:
        result = train(config, resume="auto" if begun else None)
    except DivergedError as error:
        return SweepPoint(settings, run.name, "diverged", reason=str(error))
    except torch.OutOfMemoryError as error:
        return SweepPoint(settings, run.name, "out of memory", reason=str(error).split("\n")[0])
    finally:
        # Points can have different shapes, and torch.compile recompiles a function at most eight times.
        torch.compiler.reset()
        gc.collect()
    if not math.isfinite(result.valid_loss):
        # A signal stopped the run; a diverged run raises DivergedError.
        return None
    return SweepPoint(
        settings,
        run.name,
        "finished",
        result.valid_loss,
        finite(result.train_loss),
        result.tokens_per_second,
        valid_bits_per_byte=finite(result.valid_bits_per_byte),
        train_bits_per_byte=finite(result.train_bits_per_byte),
    )


def sweep(base: TrainConfig, config: SweepConfig) -> SweepResult:
    """Train `base` at every point of the grid, each in its own folder inside `base.out`; return the results.

    The sweep continues after a run that diverges or runs out of memory, and stops at a signal. When started again, it skips
    finished points, resumes the interrupted run, and repeats the runs that ran out of memory. It writes `sweep.json` after
    every point, and `sweep.png` at the end.
    """
    axes = parse_grid(config.grid)
    configs = _configs(base, axes)
    known = _open_sweep(base)
    points: list[SweepPoint] = []
    for number, (settings, point_config) in enumerate(configs, 1):
        point = known.get(point_config.out.name)
        if point is None or point.status == "out of memory":
            print(f"point {number} of {len(configs)}: {name_of(settings)}", file=sys.stderr)
            point = _run_point(settings, point_config)
            if point is None:
                break
            known[point.run] = point
            document = {"format": FORMAT, "points": [dataclasses.asdict(each) for each in known.values()]}
            write_text(base.out / RESULT_FILE, json.dumps(document, indent=1) + "\n")
        points.append(point)
    result = SweepResult(base.out, axes, tuple(points))
    if points and can_plot():
        plot_sweep(result)
    return result
