"""Training data whose hashes are verified while a run trains."""

from ..data.verification import Verification
from ..trainer import Trainer
from .callback import Callback, Pause


class VerifiedData(Callback):
    """Ends a run whose token files do not hold what their headers say, before an epoch ends or the run says that it is done.

    The first process reads for all.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._verification = Verification(trainer.train_data.datasets if trainer.world.is_first else [])

    def after_step(self) -> None:
        """Wait for the files where the second epoch begins."""
        if sum(self.trainer.train_data.num_windows) in self.trainer.samples(self.trainer.step - 1):
            self._finish()

    def in_pause(self, pause: Pause) -> None:
        """Raise what has been found so far."""
        self._verification.check()

    def at_end(self) -> None:
        """Wait for the files after the last step, whose checkpoint is on disk by now; a run that was stopped does not."""
        if self.trainer.step == self.config.steps:
            self._finish()

    def close(self) -> None:
        """End the thread that reads."""
        self._verification.close()

    def _finish(self) -> None:
        self.trainer.world.on_first(self._verification.finish)
