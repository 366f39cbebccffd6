"""Spill counts that exceed the memory limit: write them to disk in sorted runs, and merge the runs."""

import errno
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from ...errors import UserError
from .pretoken_counts import PretokenCounts, merge_step

# Buffers of one merge step: bytes of pretokens, and pretokens. A longer pretoken enlarges the first.
_BUFFER_BYTES = 1 << 22
_BUFFER_PRETOKENS = 1 << 19

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Spill:
    """Sorted counts in files of a temporary folder in `folder`, which is removed at the end of the `with` block."""

    def __init__(self, folder: Path | str | None = None):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"scratch is {folder}: expected an existing folder for counts that do not fit in memory")
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs: deque[Path] = deque()
        self._numbers = 0
        self._lock = Lock()

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, counts: PretokenCounts) -> None:
        """Write counts, sorted by hash, as a run. A full disk raises a `UserError`."""
        if len(counts):
            with self._new_run() as writer:
                writer.write(counts, len(counts), len(counts.data))

    def merged(self) -> PretokenCounts:
        """Return the sum of all runs; its arrays are mapped from disk and stay readable after the folder is removed."""
        if not self._runs:
            none = np.empty(0, np.int64)
            return PretokenCounts(np.empty(0, np.uint8), none, none)
        while len(self._runs) > 1:
            paths = self._runs.popleft(), self._runs.popleft()
            first, second = map(_map_run, paths)
            with self._new_run() as writer:
                _merge_runs(first, second, writer)
            for path in paths:
                for part in _parts(path):
                    part.unlink()
        return _map_run(self._runs[0])

    @contextmanager
    def _new_run(self) -> Iterator["_RunWriter"]:
        with self._lock:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(
                    # Some file systems cannot remove a file, and so its folder, while it is mapped.
                    prefix=".tilewright-counts-",
                    dir=self._parent,
                    ignore_cleanup_errors=True,
                )
            self._numbers += 1
            path = Path(self._folder.name) / str(self._numbers)
        try:
            data, ends, counts = _parts(path)
            with data.open("wb") as data_file, ends.open("wb") as ends_file, counts.open("wb") as counts_file:
                yield _RunWriter(data_file, ends_file, counts_file)
        except OSError as error:
            if error.errno in _FULL:
                raise UserError(
                    f"cannot write counts to {path.parent.parent}: {error.strerror}; free disk space, choose another folder "
                    "with scratch, or raise memory"
                ) from None
            raise
        with self._lock:
            self._runs.append(path)


class _RunWriter:
    def __init__(self, data: BinaryIO, ends: BinaryIO, counts: BinaryIO):
        self._data, self._ends, self._counts = data, ends, counts
        self._size = 0

    def write(self, counts: PretokenCounts, num_pretokens: int, num_bytes: int) -> None:
        """Append the first `num_pretokens` pretokens, which have `num_bytes` bytes."""
        self._data.write(counts.data[:num_bytes].data)
        self._ends.write((counts.ends[:num_pretokens] + self._size).data)
        self._counts.write(counts.counts[:num_pretokens].data)
        self._size += num_bytes


def _parts(path: Path) -> tuple[Path, Path, Path]:
    return path.with_suffix(".data"), path.with_suffix(".ends"), path.with_suffix(".counts")


def _map_run(path: Path) -> PretokenCounts:
    data, ends, counts = _parts(path)
    return PretokenCounts(
        np.asarray(np.memmap(data, np.uint8, "r")),
        np.asarray(np.memmap(ends, np.int64, "r")),
        np.asarray(np.memmap(counts, np.int64, "r")),
    )


def _merge_runs(first: PretokenCounts, second: PretokenCounts, writer: _RunWriter) -> None:
    longest = max(int(np.diff(counts.ends, prepend=0).max()) for counts in (first, second))
    merged = PretokenCounts(
        np.empty(max(_BUFFER_BYTES, longest), np.uint8),
        np.empty(_BUFFER_PRETOKENS, np.int64),
        np.empty(_BUFFER_PRETOKENS, np.int64),
    )
    i = j = 0
    while i < len(first) or j < len(second):
        i, j, num_pretokens, num_bytes = merge_step(first, second, i, j, merged)
        writer.write(merged, num_pretokens, num_bytes)
