"""The training loop: takes steps and calls the callbacks."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .bits_per_byte import finite
from .callbacks.callback import Callback, Pause
from .distributed import AgreedStop
from .signals import StopRequest, unless_stopped
from .trainer import Trainer


class Loop:
    """Takes the remaining steps of a run, or stops at a signal.

    After each step that is due for some callback, the loop reads the step's metrics and gives all callbacks a pause.
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[Callback], stop: StopRequest | AgreedStop) -> None:
        self.trainer, self.callbacks, self.stop = trainer, callbacks, stop
        self._paused_step, self._mark = trainer.step, time.perf_counter()

    def run(self, unfinished_row: Mapping[str, Any] | None = None) -> None:
        """Complete the metrics row of the last step if it is unfinished, then take the remaining steps."""
        trainer, first_step = self.trainer, self.trainer.step
        if unfinished_row is not None:
            self._pause(dict(unfinished_row))
        self._mark = time.perf_counter()
        while trainer.step < trainer.config.steps and not self.stop:
            compiles = trainer.step == first_step
            step = trainer.train_step
            metrics = unless_stopped(step, self.stop, trainer.world.size) if compiles else step()
            if metrics is None:
                break
            for callback in self.callbacks:
                callback.after_step()
            if any(callback.is_due(callback.every) for callback in self.callbacks):
                self._pause({name: finite(float(value)) for name, value in metrics.items()})
        for callback in self.callbacks:
            callback.at_end()

    def _pause(self, row: dict[str, Any]) -> None:
        trainer = self.trainer
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        pause = Pause(row, trainer.step - self._paused_step, time.perf_counter() - self._mark)
        for callback in self.callbacks:
            callback.in_pause(pause)
        self._paused_step, self._mark = trainer.step, time.perf_counter()
