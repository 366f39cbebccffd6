"""Stop a run after too many consecutive skipped steps, with a diagnosis."""

from ...errors import DivergedError
from ..config import TrainConfig
from ..diagnosis import diagnose, summary, write_diagnosis
from .callback import Callback, Pause


class DivergenceCheck(Callback):
    """Raises a `DivergedError` after `max_skipped_steps` consecutive skipped steps, before the next checkpoint."""

    _unchecked = False

    def after_step(self) -> None:
        """Note that a step needs to be checked."""
        self._unchecked = True

    def in_pause(self, pause: Pause) -> None:
        """Check the steps since the last pause."""
        self._check()

    def at_end(self) -> None:
        """Check the steps after the last pause."""
        self._check()

    def _check(self) -> None:
        if not self._unchecked:
            return
        self._unchecked = False
        guard = self.trainer.guard
        if int(guard.most_in_a_row) < self.config.max_skipped_steps:
            # Reset the maximum, so that resuming with a lower limit does not fail for steps accepted earlier.
            guard.most_in_a_row.copy_(guard.in_a_row)
            return
        diagnosis = diagnose(self.trainer)
        path = self.trainer.world.on_first(lambda: write_diagnosis(self.config.out, diagnosis))
        raise diverged(
            self.config,
            f"{diagnosis['guard']['most_in_a_row']} consecutive steps had a non-finite loss or a loss spike: "
            f"{summary(diagnosis)}; see {path}",
        )


def diverged(config: TrainConfig, what: str) -> DivergedError:
    """Return the error of a diverged run; `what` describes the symptom."""
    return DivergedError(
        f"{what}: start a new run with --optimizer.lr below {config.optimizer.lr:g}, or a larger "
        f"--optimizer.warmup-steps; the checkpoints in {config.out} are from before the divergence"
    )
