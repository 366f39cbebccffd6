"""Verify the hashes of the training data during training."""

from ..data.verification import Verification
from ..trainer import Trainer
from .callback import Callback, Pause


class VerifiedData(Callback):
    """Raises an error if a token file does not match the hash in its header, at the latest before the second epoch or the end.

    Only the first process reads the files.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._verification = Verification(trainer.train_data.datasets if trainer.world.is_first else [])

    def after_step(self) -> None:
        """Wait for the verification at the start of the second epoch."""
        if sum(self.trainer.train_data.num_windows) in self.trainer.samples(self.trainer.step - 1):
            self._finish()

    def in_pause(self, pause: Pause) -> None:
        """Raise an error that the verification has found so far."""
        self._verification.check()

    def at_end(self) -> None:
        """Wait for the verification after the last step, unless a signal stopped the run. Its checkpoint is on disk by then."""
        if self.trainer.step == self.config.steps:
            self._finish()

    def close(self) -> None:
        """Stop the verification thread."""
        self._verification.close()

    def _finish(self) -> None:
        self.trainer.world.on_first(self._verification.finish)
