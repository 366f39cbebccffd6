"""Stop a run gracefully on a signal: finish the current step, save a checkpoint, and exit."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Records SIGTERM, SIGINT and SIGUSR1 inside the context; true once one has arrived.

    The handler only records the signal, so a signal is safe at any time, including during compilation, validation or saving. A
    second SIGINT raises `KeyboardInterrupt` immediately. Outside the main thread, the context has no effect, because Python
    allows only the main thread to set handlers.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # In a forked child, such as a compiler worker, restore the default action.
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
            # Keep a handler that other code has set inside the context.
            if signal.getsignal(number) == self._receive:
                # None means the handler was not set from Python, so Python cannot restore it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def unless_stopped(function: Callable[[], T], stop: object, num_processes: int) -> T | None:
    """Return the result of `function`, or None if it fails after a stop signal.

    Use this for calls that compile: a signal sent to the process group also kills the compiler's workers, and the compilation
    then fails before any state has changed. With several processes the error is raised, because the others would wait for this
    one.
    """
    try:
        return function()
    except Exception:
        if num_processes == 1 and stop:
            return None
        raise
