"""Error reports of a job: each message is printed once, before torchrun terminates the processes."""

import contextlib
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any


def is_first_process() -> bool:
    """Return whether this process has rank 0 or runs without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def ignore_sigterm_after_error() -> Iterator[None]:
    """In a job of several processes, ignore SIGTERM after an error in the context.

    When one process exits, torchrun sends SIGTERM to the others, which would end before they could report their errors.
    """
    try:
        yield
    except BaseException:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            set_sigterm_handler(signal.SIG_IGN)
        raise


def report_error(message: str) -> None:
    """Print an error on stderr, once per job."""
    if _is_new(message):
        print(f"tilewright: error: {message}", file=sys.stderr, flush=True)


def _is_new(message: str) -> bool:
    from .store import torchrun_store  # imports torch

    try:
        store = torchrun_store(timedelta(seconds=10))
        return store is None or store.add(f"error/{zlib.crc32(message.encode())}", 1) == 1
    except RuntimeError:
        return True


def set_sigterm_handler(handler: Any) -> None:
    """Set the handler of SIGTERM, if this is the main thread and `handler` is not None."""
    # Python sets handlers in the main thread only. `signal.getsignal` returns None for a handler that C code installed.
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)
