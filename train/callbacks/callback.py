"""Base class of callbacks."""

from dataclasses import dataclass
from typing import Any

from ..trainer import Trainer


@dataclass
class Pause:
    """A point between two steps at which the host has synchronized with the device."""

    row: dict[str, Any]
    """Metrics of the last step; callbacks add to them."""
    num_steps: int
    """Steps since the previous pause; 0 when a resumed run completes the row of its checkpoint."""
    seconds: float
    """Duration of these steps, without pauses."""
    finished: bool = True
    """Whether the row is complete. If a signal interrupts its callbacks, the row is saved in the checkpoint."""


class Callback:
    """A feature of a run. The loop calls the hooks in the order of its list of callbacks, in all processes."""

    every: int | None = None
    """Request a pause every so many steps; there is always a pause after the last step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config

    def is_due(self, every: int | None) -> bool:
        """Return whether the current step is a multiple of `every`, or the last step of the run."""
        step = self.trainer.step
        return every is not None and (step % every == 0 or step == self.config.steps)

    def after_step(self) -> None:
        """Run after every step. Do not synchronize with the device here."""

    def in_pause(self, pause: Pause) -> None:
        """Run at a pause, which any callback may have requested."""

    def at_end(self) -> None:
        """Run after the last step, or after the step in which a signal arrived."""

    def close(self) -> None:
        """Release resources. This runs however the run ends."""
