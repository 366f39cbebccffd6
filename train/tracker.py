"""Experiment trackers: TensorBoard and Weights & Biases."""

import html
import importlib.util
import secrets
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text

WANDB_FILE = "wandb-id.txt"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Tracker:
    """Receives the metrics and texts of a run. The base class discards them."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of a step, by name."""

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text of a step, such as a sample."""

    def close(self) -> None:
        """Flush buffered data and close the tracker."""


class TensorBoard(Tracker):
    """Writes TensorBoard event files to the run's folder."""

    def __init__(self, run: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides events after the resumed step, which the run writes again.
        self._writer = SummaryWriter(str(run), purge_step=resume_step + 1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of a step, by name."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text of a step."""
        # TensorBoard renders Markdown, in which indented text is a code block.
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def close(self) -> None:
        """Flush buffered data and close the tracker."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """Logs to a Weights & Biases run. Its id is stored in the run's folder, so that a resumed run continues it.

    If steps after `resume_step` were logged before, the W&B run is rewound first. If W&B refuses the rewind, it keeps the later
    steps and ignores rows until a new step is reached.
    """

    def __init__(self, run: Path, config: dict[str, Any], resume_step: int = 0, rewinds: bool = False) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        path, self._html = run / WANDB_FILE, wandb.Html
        known = path.read_text().strip() if path.is_file() else ""
        id = known or secrets.token_hex(4)
        options = {"project": "tilewright", "name": run.resolve().name, "dir": str(run), "config": config}
        if not known:
            write_text(path, id + "\n")
        try:
            if known and rewinds:
                try:
                    self._session = wandb.init(**options, resume_from=f"{id}?_step={resume_step}")
                    return
                except wandb.Error as error:
                    message = f"W&B cannot rewind run {id} to step {resume_step} and keeps the later steps: {error}"
                    print(message, file=sys.stderr)
            self._session = wandb.init(**options, id=id, resume="allow")
        except wandb.Error as error:
            raise UserError(
                f"cannot start tracker wandb ({error}): set WANDB_MODE=offline, or use another --tracker"
            ) from error

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of a step, by name."""
        self._session.log(metrics, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text of a step."""
        self._session.log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """Flush buffered data and close the tracker."""
        self._session.finish()


def check_tracker(kind: str) -> None:
    """Raise a `UserError` if the tracker's package is not installed."""
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"tracker {kind} is not installed: pip install 'tilewright[{kind}]'")


def open_tracker(kind: str, run: Path, config: dict[str, Any], resume_step: int, rewinds: bool) -> Tracker:
    """Return the tracker of a run resumed at `resume_step`; `rewinds` is true if later steps were logged before."""
    check_tracker(kind)
    if kind == "tensorboard":
        return TensorBoard(run, resume_step)
    if kind == "wandb":
        return WeightsAndBiases(run, config, resume_step, rewinds)
    return Tracker()
