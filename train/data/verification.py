"""Background verification of the hashes of token files while a run trains on them."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence

from tqdm import tqdm

from .token_file import TokenDataset

_LOWEST_PRIORITY = 19


class _ClosedError(Exception):
    pass


class Verification:
    """Hashes the files of `datasets` in a thread of the lowest priority, which sleeps after each piece for as long as it took.

    After a call of `finish`, the thread no longer sleeps.
    """

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        self._files, self._num_read = [file for dataset in datasets for file in dataset.files], 0
        self._failure: Exception | None = None
        self._hurry, self._closing, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._mark = time.perf_counter()
        threading.Thread(target=self._run, name="verification", daemon=True).start()

    def check(self) -> None:
        """Raise the error found so far, if any: a `UserError` that names the file."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait, with a progress bar, until all files are hashed. Raises as `check` does."""
        self._hurry.set()
        total = sum(file.stamp.size for file in self._files)
        with tqdm(
            total=total, initial=self._num_read, desc="checking the data", unit="B", unit_scale=True, disable=None, delay=1
        ) as bar:
            while not self._ended.wait(0.1):
                bar.update(self._num_read - bar.n)
        self.check()

    def close(self) -> None:
        """Stop the thread without hashing the rest."""
        self._closing.set()
        self._hurry.set()
        self._ended.wait()

    def _run(self) -> None:
        if sys.platform == "linux":
            # On Linux the priority is per thread.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            for file in self._files:
                file.verify(self._after_piece)
        except _ClosedError:
            pass
        except Exception as error:
            self._failure = error
        finally:
            self._ended.set()

    def _after_piece(self, num_bytes: int) -> None:
        self._num_read += num_bytes
        self._hurry.wait(time.perf_counter() - self._mark)
        if self._closing.is_set():
            raise _ClosedError
        self._mark = time.perf_counter()
