"""Save checkpoints during training."""

from ..checkpoint.writer import CheckpointWriter
from ..schedule import decay_start
from ..trainer import Trainer
from .callback import Callback, Pause


class Checkpoints(Callback):
    """Saves every `checkpoint_every` steps, before the wsd decay, and at the end.

    A checkpoint includes the metrics row of its step if that row is unfinished.
    """

    def __init__(self, trainer: Trainer, writer: CheckpointWriter) -> None:
        super().__init__(trainer)
        self.every, self.writer = self.config.checkpoint_every, writer
        self._decay_start = decay_start(self.config)
        self._saved_step = trainer.step
        self._pause: Pause | None = None

    def is_due(self, every: int | None) -> bool:
        """Return whether to save after the current step; the checkpoint before a wsd decay allows extending the run."""
        return super().is_due(every) or self.trainer.step == self._decay_start

    def after_step(self) -> None:
        """Clear the pause of an earlier step."""
        self._pause = None

    def in_pause(self, pause: Pause) -> None:
        """Save if the step is due."""
        self._pause = pause
        if pause.num_steps and self.is_due(self.every):
            self._save()

    def at_end(self) -> None:
        """Save the last step if it is not saved yet, and wait for the writer."""
        if self.trainer.step != self._saved_step:
            self._save()
        self.writer.wait()

    def _save(self) -> None:
        step, pause = self.trainer.step, self._pause
        unfinished = pause.row if pause and not pause.finished else None
        valid_loss = pause.row.get("valid_loss") if pause else None
        self.writer.save(step, self.trainer.tensors(), {"unfinished_row": unfinished}, valid_loss)
        self._saved_step = step
