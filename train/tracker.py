"""Trackers: where a run's metrics and texts go besides the console and its folder."""

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
    """What a run hands its metrics and texts to; this one keeps nothing."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of a step, by name."""

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text of a step, such as a sample."""

    def close(self) -> None:
        """Hand on what is still held back."""


class TensorBoard(Tracker):
    """Writes the events of TensorBoard into the run's folder."""

    def __init__(self, run: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the step that a run goes on from are hidden, because they come again.
        self._writer = SummaryWriter(str(run), purge_step=resume_step + 1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of a step, by name."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text of a step."""
        # Indented, because the text is shown as Markdown.
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def close(self) -> None:
        """Hand on what is still held back."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """Sends to one run of Weights & Biases, whose id is kept in the run's folder; a resumed run goes on with it.

    Where steps after `resume_step` were logged, W&B forgets them first ("rewind"). Where W&B refuses that, it keeps them, and
    ignores the rows that come again until a new step is reached.
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
                    message = f"W&B does not rewind run {id} to step {resume_step} ({error}): it keeps the later steps"
                    print(message, file=sys.stderr)
            self._session = wandb.init(**options, id=id, resume="allow")
        except wandb.Error as error:
            raise UserError(f"tracker wandb cannot begin ({error}): set WANDB_MODE=offline, or another --tracker") from error

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of a step, by name."""
        self._session.log(metrics, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Take a text of a step."""
        self._session.log({name: self._html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """Hand on what is still held back."""
        self._session.finish()


def check_tracker(kind: str) -> None:
    """Raise a `UserError` where the tracker's package is not installed."""
    package = _PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"tracker {kind} is not installed: pip install 'tilewright[{kind}]'")


def open_tracker(kind: str, run: Path, config: dict[str, Any], resume_step: int, rewinds: bool) -> Tracker:
    """Return the tracker of a run that goes on after `resume_step`; `rewinds` where later steps were logged before."""
    check_tracker(kind)
    if kind == "tensorboard":
        return TensorBoard(run, resume_step)
    if kind == "wandb":
        return WeightsAndBiases(run, config, resume_step, rewinds)
    return Tracker()
