"""Validate during training."""

import math

from ..distributed import AgreedStop
from ..signals import StopRequest, unless_stopped
from ..trainer import Trainer
from .callback import Callback, Pause
from .divergence import diverged


class Validation(Callback):
    """Adds `valid_loss` (nats per token) to the row every `eval_every` steps; a non-finite loss ends the run."""

    def __init__(self, trainer: Trainer, stop: StopRequest | AgreedStop) -> None:
        super().__init__(trainer)
        self.every, self._stop = self.config.eval_every, stop
        self.loss = math.nan
        """Loss of the last validation; NaN if a signal interrupted it."""
        self._interrupted = False

    def in_pause(self, pause: Pause) -> None:
        """Validate; if a signal interrupts, the row stays unfinished."""
        if not self.is_due(self.every):
            return
        self._validate()
        if self._interrupted:
            pause.finished = False
            return
        if not math.isfinite(self.loss):
            # The guard checks losses before the update; this loss is after it.
            raise diverged(self.config, f"valid_loss is {self.loss}")
        pause.row["valid_loss"] = self.loss

    def at_end(self) -> None:
        """Validate a finished run that was resumed, because its result needs a validation loss."""
        if self.trainer.step == self.config.steps and math.isnan(self.loss) and not self._interrupted:
            self._validate()

    def _validate(self) -> None:
        loss = unless_stopped(lambda: self.trainer.validate(lambda: bool(self._stop)), self._stop, self.trainer.world.size)
        self._interrupted, self.loss = loss is None, math.nan if loss is None else loss
