"""Errors of a job: said once however many processes meet them, and before torchrun ends the others."""

import contextlib
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from .store import torchrun_store


def is_first_process() -> bool:
    """Return whether this process is the first of those that torchrun started, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def says_why_it_ends() -> Iterator[None]:
    """After an error in the context, ignore SIGTERM where there are other processes.

    With it torchrun ends them once one has ended, before they can say what they have met.
    """
    try:
        yield
    except BaseException:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            on_sigterm(signal.SIG_IGN)
        raise


def report_error(message: str) -> None:
    """Print an error on stderr, once however many processes meet it."""
    if _is_new(message):
        print(f"tilewright: error: {message}", file=sys.stderr, flush=True)


def _is_new(message: str) -> bool:
    try:
        store = torchrun_store(timedelta(seconds=10))
        return store is None or store.add(f"error/{zlib.crc32(message.encode())}", 1) == 1
    except RuntimeError:
        return True


def on_sigterm(handler: Any) -> None:
    """Handle SIGTERM so from now on."""
    # Only the main thread may, and None stands for a handler that was not set from Python.
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)
