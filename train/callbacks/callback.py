"""What a callback is: a feature of a run that hears of its steps."""

from dataclasses import dataclass
from typing import Any

from ..trainer import Trainer


@dataclass
class Pause:
    """A halt between two steps, in which the host waits for the device."""

    row: dict[str, Any]
    """What is logged of the step before; callbacks add to it."""
    num_steps: int
    """Steps since the pause before; 0 where a resumed run finishes the row of its checkpoint."""
    seconds: float
    """What these steps took, without pauses."""
    finished: bool = True
    """Whether the row is complete. A signal may come before it is: then it waits in the checkpoint."""


class Callback:
    """A feature of a run. A run calls the hooks of its callbacks in the order of their list, in all processes."""

    every: int | None = None
    """Steps between two pauses that the callback asks for, beside the one after the last step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config

    def is_due(self, every: int | None) -> bool:
        """Return whether the step that was taken last is one of `every` so many, or the run's last one."""
        step = self.trainer.step
        return every is not None and (step % every == 0 or step == self.config.steps)

    def after_step(self) -> None:
        """Hear of a step; the host does not wait for the device here."""

    def in_pause(self, pause: Pause) -> None:
        """Act in a pause, which any callback may have asked for."""

    def at_end(self) -> None:
        """Act after the last step, or after the one that a signal came in."""

    def close(self) -> None:
        """Free what the callback holds, in whatever way the run ends."""
