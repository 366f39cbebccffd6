"""Files as byte streams, decompressed while reading; all errors name the file."""

import importlib
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError

COMPRESSED = (".gz", ".zst")
# Compressed bytes per step: few, because zstd can expand them 2^15 times.
_COMPRESSED_BYTES = 1 << 11


def open_file(path: Path) -> BinaryIO:
    """Open a file without a buffer; a file that cannot be opened raises a `UserError`."""
    try:
        return path.open("rb", 0)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def open_stream(path: Path) -> io.RawIOBase:
    """Open a file; a .gz or .zst file is decompressed.

    Reading raises a `UserError` for a file that is damaged, truncated, or shrinks while it is read. A growing file is read up
    to its size at opening.
    """
    if path.suffix.lower() == ".gz":
        return _Decompressed(path, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), zlib.error)
    if path.suffix.lower() == ".zst":
        zstandard = imported("zstandard", path)
        return _Decompressed(path, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
    return _Plain(path)


def imported(name: str, path: Path) -> Any:
    """Return the module that reads the file at `path`; if it is not installed, raise a `UserError`."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise UserError(f"cannot read {path}: it needs {package}; pip install 'tilewright[data]'") from None


class _Plain(io.RawIOBase):
    def __init__(self, path: Path):
        self._path, self._file = path, open_file(path)
        self._size = self._left = os.fstat(self._file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = _checked(self._path, self._file.readinto, memoryview(buffer)[: self._left])  # pyright: ignore[reportAttributeAccessIssue]
        if size == 0 and self._left and len(buffer):
            read = self._size - self._left
            raise UserError(f"{self._path} shrank from {self._size} to {read} bytes while it was read")
        self._left -= size
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """Any number of concatenated compressed parts. `start` creates a decompressor, as `zlib.decompressobj` does."""

    def __init__(self, path: Path, start: Callable[[], Any], failure: type[Exception]):
        self._path, self._file = path, open_file(path)
        self._start, self._failure = start, failure
        self._part = start()
        self._compressed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or _checked(self._path, self._file.read, _COMPRESSED_BYTES)
            if not self._compressed:
                if not self._part.eof:
                    raise UserError(f"{self._path} is cut off: its last compressed part has no end")
                return 0
            if self._part.eof:
                # Zero padding, as on tapes, does not start a part.
                self._compressed = self._compressed.lstrip(b"\0")
                if not self._compressed:
                    continue
                self._part = self._start()
            try:
                self._ready = memoryview(self._part.decompress(self._compressed))
            except self._failure as error:
                raise UserError(f"{self._path} is damaged, or not a {self._path.suffix} file: {error}") from None
            self._compressed = self._part.unused_data if self._part.eof else b""
        size = min(len(buffer), len(self._ready))
        memoryview(buffer)[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _checked(path: Path, read: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return read(argument)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
