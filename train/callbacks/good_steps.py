"""The end of a run whose steps are skipped in a row, with a diagnosis."""

from ...errors import DivergedError
from ..config import TrainConfig
from ..diagnosis import diagnose, summary, write_diagnosis
from .callback import Callback, Pause


class GoodSteps(Callback):
    """Raises a `DivergedError` after `max_skipped_steps` skipped steps in a row, before anything of them is saved."""

    _unseen = False

    def after_step(self) -> None:
        """Note that there is a step to look at."""
        self._unseen = True

    def in_pause(self, pause: Pause) -> None:
        """Look at the steps since the last pause."""
        self._look()

    def at_end(self) -> None:
        """Look at the steps after the last pause."""
        self._look()

    def _look(self) -> None:
        if not self._unseen:
            return
        self._unseen = False
        guard = self.trainer.guard
        if int(guard.most_in_a_row) < self.config.max_skipped_steps:
            # What was within the limit stays so, even where the run goes on with a lower one.
            guard.most_in_a_row.copy_(guard.in_a_row)
            return
        diagnosis = diagnose(self.trainer)
        path = self.trainer.world.on_first(lambda: write_diagnosis(self.config.out, diagnosis))
        raise diverged(
            self.config,
            f"{diagnosis['guard']['most_in_a_row']} steps in a row had a loss that is not finite or a spike: "
            f"{summary(diagnosis)}; see {path}",
        )


def diverged(config: TrainConfig, what: str) -> DivergedError:
    """Return the error of a run of which `what` says that it diverges."""
    return DivergedError(
        f"{what}: start a new run with a lower --optimizer.lr, below {config.optimizer.lr:g}, or a longer "
        f"--optimizer.warmup-steps; the checkpoints in {config.out} are from before"
    )
