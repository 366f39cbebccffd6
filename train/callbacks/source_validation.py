"""Validate each source of a data mixture during training."""

from ..distributed import AgreedStop
from ..signals import StopRequest, unless_stopped
from ..trainer import Trainer
from .bits_per_byte import finite
from .callback import Callback, Pause


class SourceValidation(Callback):
    """Adds `valid_loss/NAME` and `valid_bits_per_byte/NAME` of each source to rows with a validation loss."""

    def __init__(self, trainer: Trainer, stop: StopRequest | AgreedStop) -> None:
        super().__init__(trainer)
        self._stop = stop

    def in_pause(self, pause: Pause) -> None:
        """Validate each source; if a signal interrupts, the row stays unfinished."""
        if "valid_loss" not in pause.row:
            return
        validate = self.trainer.validate_sources
        losses = unless_stopped(lambda: validate(lambda: bool(self._stop)), self._stop, self.trainer.world.size)
        if losses is None:
            pause.finished = False
            return
        pause.row |= {name: finite(value) for name, value in losses.items()}
