"""Text of files on the hub, read by range requests: one column of Parquet files, whole JSON lines files."""

import gzip
import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from urllib.parse import quote

from ...errors import UserError
from ...tokenizer.text.sources import json_text
from .hub import PARQUET, HubFile, hub_errors

# Bounds of the read-ahead of row groups, which hides the latency of requests.
_REQUESTS_AHEAD = 8
_BYTES_AHEAD = 1 << 27
_STREAM_BYTES = 1 << 23
# Lines per unit of a JSON lines file. A fetch can resume between units.
_LINES = 1000
_TIMEOUT_S = 60


class Place(NamedTuple):
    """The position where a fetch resumes: the index of a file, and of a row group or a block of 1,000 lines in it."""

    file: int
    unit: int


class HubReader:
    """Reads ranges of the files of a commit. Retries broken connections with exponential backoff."""

    def __init__(self, repo: str, commit: str):
        from huggingface_hub.utils import build_hf_headers

        self.repo, self.commit = repo, commit
        self._headers = build_hf_headers()

    def read(self, file: HubFile, start: int, size: int) -> bytes:
        """Return `size` bytes from offset `start`. Raises a `UserError` if the hub does not provide them."""
        from huggingface_hub import constants
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        url = f"{constants.ENDPOINT}/datasets/{self.repo}/resolve/{quote(self.commit)}/{quote(file.path)}"
        headers = {**self._headers, "Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        with hub_errors(self.repo):
            response = http_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S)
            hf_raise_for_status(response)
        total = response.headers.get("Content-Range", f"/{len(response.content)}").rpartition("/")[2]
        if total != str(file.size) or len(response.content) != size:
            raise UserError(f"{file.path} of {self.repo} has {total} bytes: expected {file.size}; it has changed on the hub")
        return response.content


class _RangeFile(io.RawIOBase):
    """A file object for a file on the hub. Reads within `held`, the bytes from `held_start` on, need no request."""

    def __init__(self, reader: HubReader, file: HubFile, held_start: int = 0, held: bytes = b""):
        self._reader, self._file, self._at = reader, file, 0
        self._start, self._held = held_start, memoryview(held)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._at)
        if size <= 0:
            return 0
        if self._start <= self._at and self._at + size <= self._start + len(self._held):
            first = self._at - self._start
            buffer[:size] = self._held[first : first + size]
        else:
            buffer[:size] = self._reader.read(self._file, self._at, size)
        self._at += size
        return size


def iter_units(
    reader: HubReader, files: Sequence[HubFile], column: str, begin: Place
) -> Iterator[tuple[Place, Iterator[str | None]]]:
    """Yield the place after each unit, from `begin` on, and the unit's texts. Consume the texts before you take the next unit.

    Raises a `UserError` if the column is missing or does not hold text, or if a file is damaged or has another format.
    """
    number = begin.file
    while number < len(files):
        end = number
        while end < len(files) and files[end].path.endswith(PARQUET) == files[number].path.endswith(PARQUET):
            end += 1
        unit = begin.unit if number == begin.file else 0
        read = _parquet_units if files[number].path.endswith(PARQUET) else _line_units
        for at, texts in read(reader, files[number:end], column, unit):
            yield Place(number + at.file, at.unit), texts
        number = end


@dataclass(frozen=True)
class _Group:
    file: int
    unit: int
    is_last: bool
    metadata: Any
    start: int
    size: int


def _parquet_units(
    reader: HubReader, files: Sequence[HubFile], column: str, skipped: int
) -> Iterator[tuple[Place, Iterator[str | None]]]:
    waiting: deque[tuple[_Group, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(_REQUESTS_AHEAD)
    try:
        for group in _groups(reader, files, column, skipped):
            while waiting and (
                len(waiting) >= _REQUESTS_AHEAD or group.size + sum(each.size for each, _ in waiting) > _BYTES_AHEAD
            ):
                yield _decode(reader, files, column, *waiting.popleft())
            waiting.append((group, pool.submit(reader.read, files[group.file], group.start, group.size)))
        while waiting:
            yield _decode(reader, files, column, *waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(reader: HubReader, files: Sequence[HubFile], column: str, skipped: int) -> Iterator[_Group]:
    for number, file in enumerate(files):
        metadata = read_metadata(reader, file, column)
        for unit in range(0 if number else skipped, metadata.num_row_groups):
            chunk = _column_chunk(metadata, unit, column)
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            yield _Group(number, unit, unit + 1 == metadata.num_row_groups, metadata, start, chunk.total_compressed_size)


def read_metadata(reader: HubReader, file: HubFile, column: str) -> Any:
    """Return the `pyarrow.parquet.FileMetaData` of a file. Raises a `UserError` if it lacks the text column `column`."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(_RangeFile(reader, file))
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.path} of {reader.repo} is damaged, or not a Parquet file: {error}") from None
    schema = metadata.schema.to_arrow_schema()
    if column not in schema.names:
        raise UserError(f"{reader.repo} has no column {column!r}: choose one of {', '.join(schema.names)} with --column")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"column {column!r} of {reader.repo} has type {kind}: expected text; choose one with --column")
    return metadata


def column_sizes(metadata: Any, column: str) -> tuple[int, int]:
    """Return the compressed bytes of a column in a file, and the bytes of its text."""
    chunks = [_column_chunk(metadata, unit, column) for unit in range(metadata.num_row_groups)]
    # A length of four bytes precedes each text.
    text = sum(chunk.total_uncompressed_size - 4 * chunk.num_values for chunk in chunks)
    return sum(chunk.total_compressed_size for chunk in chunks), max(0, text)


def _column_chunk(metadata: Any, unit: int, column: str) -> Any:
    group = metadata.row_group(unit)
    return next(chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema == column)


def _decode(
    reader: HubReader, files: Sequence[HubFile], column: str, group: _Group, data: Future[bytes]
) -> tuple[Place, Iterator[str | None]]:
    behind = Place(group.file + 1, 0) if group.is_last else Place(group.file, group.unit + 1)
    return behind, _texts_of_group(reader, files[group.file], column, group, data.result())


def _texts_of_group(reader: HubReader, file: HubFile, column: str, group: _Group, data: bytes) -> Iterator[str | None]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(_RangeFile(reader, file, group.start, data), metadata=group.metadata) as table:
            for batch in table.iter_batches(batch_size=256, row_groups=[group.unit], columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file.path} of {reader.repo}, row group {group.unit}, is damaged: {error}") from None


def _line_units(
    reader: HubReader, files: Sequence[HubFile], column: str, skipped: int
) -> Iterator[tuple[Place, Iterator[str | None]]]:
    for number, file in enumerate(files):
        lines = enumerate(_lines(reader, file), 1)
        unit, last = 0, cast(bytes, object())
        while True:
            texts = [(line, index) for index, line in (next(lines, (0, last)) for _ in range(_LINES)) if line is not last]
            unit += 1
            if unit > skipped or number:
                behind = Place(number, unit) if len(texts) == _LINES else Place(number + 1, 0)
                place = f"of {file.path} of {reader.repo}"
                yield behind, (json_text(line, column, f"line {index} {place}") for line, index in texts)
            if len(texts) < _LINES:
                break


def _lines(reader: HubReader, file: HubFile) -> Iterator[bytes]:
    stream: Any = io.BufferedReader(_RangeFile(reader, file), _STREAM_BYTES)
    if file.path.endswith(".gz"):
        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream))
    elif file.path.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"cannot read {file.path}: it needs zstandard; pip install 'tilewright[data]'") from None
        stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True))
    try:
        yield from (line for line in stream if line.strip())
    except (EOFError, gzip.BadGzipFile, ValueError) as error:
        raise UserError(f"{file.path} of {reader.repo} is damaged: {error}") from None
