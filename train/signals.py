"""Signals that ask a run to stop: it finishes its step, saves, and ends as if its work were done."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether a signal has asked the run to stop, while the context lasts.

    A handler of its own only remembers the signal, so that it may come at any moment: inside a compilation, a validation or a
    save. A second SIGINT interrupts at once, with `KeyboardInterrupt`. Outside the main thread, which alone may set handlers,
    nothing is changed.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A forked child, such as a worker of the compiler, goes as it would have gone without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # Another handler that was set since is there to stay.
            if signal.getsignal(number) == self._receive:
                # None stands for a handler that was not set from Python, and cannot be set again from here.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def unless_stopped(compiling: Callable[[], T], stop: object, num_processes: int) -> T | None:
    """Return what `compiling` gives; None where it fails after a signal, which whoever sends it sends to the compiler too.

    That is before anything has changed. Of several processes the others would wait for this one: there, the error stays.
    """
    try:
        return compiling()
    except Exception:
        if num_processes == 1 and stop:
            return None
        raise
