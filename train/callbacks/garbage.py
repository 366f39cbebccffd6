"""Run Python's garbage collector at pauses only, so that it does not delay steps."""

import gc

from ..trainer import Trainer
from .callback import Callback, Pause


class GarbageCollection(Callback):
    """Disables automatic garbage collection and collects at pauses.

    Objects that exist before training or after the first step are frozen, which excludes them from collections.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._was_enabled, self._has_begun = gc.isenabled(), False
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self) -> None:
        """Freeze the objects that the first step created, such as compiled code."""
        if not self._has_begun:
            self._has_begun = True
            gc.collect()
            gc.freeze()

    def in_pause(self, pause: Pause) -> None:
        """Collect garbage."""
        gc.collect()

    def close(self) -> None:
        """Restore the state of the collector."""
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
