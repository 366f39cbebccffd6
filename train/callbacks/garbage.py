"""Python's garbage collector, which would stop a step: a run calls it in its pauses."""

import gc

from ..trainer import Trainer
from .callback import Callback, Pause


class GarbageCollection(Callback):
    """Collects in pauses only, and never looks again at what lives before the first step and after it."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._was_enabled, self._has_begun = gc.isenabled(), False
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self) -> None:
        """Set aside what the first step has made, such as compiled code."""
        if not self._has_begun:
            self._has_begun = True
            gc.collect()
            gc.freeze()

    def in_pause(self, pause: Pause) -> None:
        """Collect."""
        gc.collect()

    def close(self) -> None:
        """Leave the collector as it was."""
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
