"""Metrics of a run: one JSON object a line in `metrics.jsonl`, and on to a tracker where one is asked for."""

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import named_errors, sync, write_text

FILE_NAME = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics; a last line cut short by a crash is left out."""
    path = run / FILE_NAME
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def sync_metrics(run: Path) -> None:
    """Return when the rows that have been logged, if any, would outlive a crash of the machine."""
    path = run / FILE_NAME
    with contextlib.suppress(FileNotFoundError), named_errors(path):
        sync(path)


def check_tracker(kind: str) -> None:
    """Raise a `UserError` where the tracker's package is not installed."""
    package = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"tracker {kind} is not installed: pip install 'tilewright[{kind}]'")


def _tracker(kind: str, run: Path, config: dict[str, Any], resume_step: int):
    """Return a function (metrics, step) and one that closes the tracker."""
    check_tracker(kind)
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # Events after the step that a run goes on from are hidden, because they come again.
        writer = SummaryWriter(str(run), purge_step=resume_step + 1)

        def log(metrics: dict[str, Any], step: int) -> None:
            for name, value in metrics.items():
                if value is not None:
                    writer.add_scalar(name, value, step)

        return log, writer.close
    if kind == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        session = wandb.init(project="tilewright", name=run.name, dir=str(run), config=config)
        return lambda metrics, step: session.log(metrics, step=step), session.finish
    return lambda metrics, step: None, lambda: None


class MetricLog:
    """Appends rows to a run's `metrics.jsonl` and hands them on to its tracker."""

    def __init__(self, run: Path, tracker: str = "none", config: dict[str, Any] | None = None, resume_step: int = 0) -> None:
        """Open the log; rows after `resume_step` are dropped, because a resumed run writes them again."""
        self._send, self._close = _tracker(tracker, run, config or {}, resume_step)
        kept = [row for row in read_metrics(run) if row["step"] <= resume_step]
        self._path = run / FILE_NAME
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", buffering=1)

    def log(self, step: int, **metrics: float | None) -> None:
        """Write one row."""
        with named_errors(self._path):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._send(metrics, step)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with named_errors(self._path):
                self._file.close()
        finally:
            self._close()
