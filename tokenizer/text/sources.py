"""Text sources: files, folders and globs, compressed or not, columns of tables, Python iterables.

All sources yield blocks of bytes that can be tokenized separately. Text is UTF-8. Invalid bytes are passed on unchanged, and
tokenization reads them as U+FFFD.

    .txt and all others   text, one document each, cut into blocks at places that no pretoken crosses
    .jsonl .ndjson        one JSON object a line; one of its entries holds the text of a document
    .parquet              a table; one of its columns holds the texts of documents (needs pyarrow)
    .gz .zst              any of the above except .parquet, compressed (.zst needs zstandard)

Endings are case-insensitive.
"""

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError
from ...files import require_file
from .borders import last_border
from .streams import COMPRESSED, imported, open_file, open_stream
from .utf8 import encode_utf8

BLOCK_BYTES = 1 << 21
# Padding: compiled loops read whole words, up to this far past the end of a block.
_SLACK = bytes(64)
_JSON_BUFFER = 1 << 16

_MOST_WEIGHT = (1 << 63) - 1

_JSON_LINES = (".jsonl", ".ndjson")
_UNREADABLE = (".zip", ".bz2", ".xz", ".7z", ".lz4")


class Block(NamedTuple):
    """A piece of text that can be tokenized separately from all others.

    `data` is uint8, followed in memory by 64 readable bytes. It holds documents that end at `ends` (int64); the last one ends
    at the end of `data`. No pretoken and no special token crosses an end. All of it counts `weight` times. `continues` marks
    that the first document began in the previous block.
    """

    data: np.ndarray
    ends: np.ndarray
    weight: int = 1
    continues: bool = False


@dataclass(frozen=True)
class Files:
    """A file, all files below a folder (except hidden ones), or the matches of a glob; each counts `weight` times.

    `column` names the text in the objects of JSON lines and the tables of Parquet; null is an empty text.
    """

    path: Path | str
    column: str = "text"
    weight: int = 1


@dataclass(frozen=True)
class Documents:
    """Documents from Python: any iterable of texts, or of (text, weight), read once.

    Bytes are read as UTF-8. A surrogate in a str becomes U+FFFD. The thread that requests blocks runs the iterable.
    """

    texts: Iterable[str | bytes | tuple[str | bytes, int]]
    weight: int = 1


Source = Path | str | Files | Documents
Inputs = Source | Sequence[Source]


def iter_blocks(
    inputs: Inputs,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = "gpt2",
    block_bytes: int = BLOCK_BYTES,
    document_end: str = "",
) -> Iterator[Block]:
    """Return an iterator over the text of the inputs, in order, in blocks of about `block_bytes` bytes.

    `document_end` is appended to each document of JSON lines and Parquet; other texts contain their own separators. `inputs`
    is one source or several; a path means `Files(path)`. A longer document, or text without a place to cut, makes a longer
    block. For a pattern that is neither in `PATTERNS` nor `LINES`, text is cut at special tokens only.

    Raises a `UserError` at once for a missing or unreadable file, inputs without any text, or a weight below 1; and during
    iteration for a file that is damaged, truncated, or shrinks while it is read.
    """
    sources = resolve(inputs)
    if block_bytes < 1:
        raise UserError(f"block_bytes is {block_bytes}: expected at least 1")
    specials = tuple(token.encode() for token in special_tokens)
    end = document_end.encode()
    return (block for source in sources for block in _blocks_of(source, specials, pattern, block_bytes, end))


def resolve(inputs: Inputs) -> list[Files | Documents]:
    """Return the sources, with each `Files` a single readable file that is not empty; see `iter_blocks` for the errors."""
    sources: list[Files | Documents] = []
    for source in [inputs] if isinstance(inputs, Path | str | Files | Documents) else inputs:
        if isinstance(source, Path | str):
            source = Files(source)
        elif not isinstance(source, Files | Documents):
            raise TypeError(f"an input is a {type(source).__name__}: expected a path, Files or Documents")
        _check_weight(source.weight)
        if isinstance(source, Documents):
            sources.append(source)
        else:
            sources += [Files(path, source.column, source.weight) for path in _paths_of(Path(source.path))]
    if not sources:
        raise UserError("there is no input: expected at least one file or iterable of texts")
    return sources


def text_bytes(inputs: Inputs) -> int | None:
    """Return the size of the text, or None if it is unknown: compressed, in columns, or from Python."""
    sources = resolve(inputs)
    if all(isinstance(source, Files) and _is_plain(Path(source.path)) for source in sources):
        return sum(Path(source.path).stat().st_size for source in sources if isinstance(source, Files))
    return None


def _is_plain(path: Path) -> bool:
    return path.suffix.lower() not in (*COMPRESSED, *_JSON_LINES, ".parquet")


def _check_weight(weight: Any) -> int:
    if not isinstance(weight, int) or not 1 <= weight <= _MOST_WEIGHT:
        raise UserError(f"weight is {weight!r}: expected an integer from 1 to 2^63 - 1")
    return weight


def _paths_of(path: Path) -> list[Path]:
    """Return the files of a path, folder or glob, sorted by name, without empty files."""
    try:
        if path.is_dir():
            found, what = sorted(_files_below(path)), f"folder {path}"
        elif not path.exists() and glob.has_magic(str(path)):
            found, what = sorted(map(Path, glob.glob(str(path), recursive=True))), f"glob {path}"
        else:
            found, what = [require_file(path, "text file")], ""
        paths = [each for each in found if each.is_file() and each.stat().st_size]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    if not paths:
        raise UserError(f"{what} holds no non-empty file")
    for each in paths:
        if each.suffix.lower() in _UNREADABLE:
            raise UserError(f"{each} has an unsupported compression: expected {' or '.join(COMPRESSED)}")
        with open_file(each):
            pass
    return paths


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _blocks_of(
    source: Files | Documents, specials: tuple[bytes, ...], pattern: str, block_bytes: int, document_end: bytes
) -> Iterator[Block]:
    if isinstance(source, Documents):
        for weight, group in groupby(map(_text_and_weight, source.texts), key=lambda item: item[1]):
            yield from _packed((text for text, _ in group), _check_weight(source.weight * weight), block_bytes)
        return
    path = Path(source.path)
    name = Path(path.name.lower())
    kind = Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix
    if name.suffix == ".parquet":
        yield from _packed((text + document_end for text in _parquet_texts(path, source.column)), source.weight, block_bytes)
    elif kind in _JSON_LINES:
        yield from _packed((text + document_end for text in _json_texts(path, source.column)), source.weight, block_bytes)
    elif kind == ".parquet":
        raise UserError(f"{path} is a compressed Parquet file: decompress it; Parquet compresses its own columns")
    else:
        yield from _cut(path, source.weight, specials, pattern, block_bytes)


def _text_and_weight(item: Any) -> tuple[bytes, int]:
    text, weight = item if isinstance(item, tuple) else (item, 1)
    if isinstance(text, str):
        text = encode_utf8(text)
    elif not isinstance(text, bytes):
        raise TypeError(f"a document is a {type(text).__name__}: expected str, bytes, or a tuple of one of them and a weight")
    return text, _check_weight(weight)


def _packed(texts: Iterable[bytes], weight: int, block_bytes: int) -> Iterator[Block]:
    waiting: list[bytes] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= block_bytes:
            yield _block_of(waiting, weight)
            waiting, size = [], 0
    if size:
        yield _block_of(waiting, weight)


def _block_of(texts: list[bytes], weight: int) -> Block:
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    return Block(np.frombuffer(b"".join([*texts, _SLACK]), np.uint8)[: ends[-1]], ends, weight)


def _cut(path: Path, weight: int, specials: tuple[bytes, ...], pattern: str, block_bytes: int) -> Iterator[Block]:
    held, num_requested, continues = bytearray(), block_bytes, False
    with open_stream(path) as stream:
        while True:
            full = len(held) + num_requested
            buffer = bytearray(full + len(_SLACK))
            buffer[: len(held)] = held
            end = len(held) + _fill(stream, memoryview(buffer)[len(held) : full])
            border = end if end < full else last_border(buffer, specials, pattern, end)
            if border:
                yield Block(np.frombuffer(buffer, np.uint8)[:border], np.array([border], np.int64), weight, continues)
                continues = True
            if end < full:
                return
            held = buffer[border:end]
            # Searching again only after doubling keeps the total work linear.
            num_requested = block_bytes if border else len(held)


def _fill(stream: io.RawIOBase, view: memoryview) -> int:
    filled = 0
    while filled < len(view) and (size := stream.readinto(view[filled:])):
        filled += size
    return filled


def _json_texts(path: Path, column: str) -> Iterator[bytes]:
    with io.BufferedReader(open_stream(path), _JSON_BUFFER) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield encode_utf8(json_text(line, column, f"{path}, line {number}") or "")


def json_text(line: bytes, column: str, place: str) -> str | None:
    """Return the text in a column of a JSON object; a line without it raises a `UserError` that starts with `place`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON in UTF-8, or is cut off: {error}") from None
    if not isinstance(entry, dict) or column not in entry:
        there = ", ".join(entry) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise UserError(f"{place} has no column {column!r}: it has {there}; name the column of the text")
    text = entry[column]
    if not isinstance(text, str | None):
        raise UserError(f"{place} has a {type(text).__name__} in column {column!r}: expected text")
    return text


def _parquet_texts(path: Path, column: str) -> Iterator[bytes]:
    pyarrow, parquet = imported("pyarrow", path), imported("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise UserError(f"{path} has no column {column!r}: it has {', '.join(schema.names)}")
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).cast(pyarrow.string()).cast(pyarrow.binary()).to_pylist():
                    yield text or b""
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path} is damaged, or column {column!r} is not text: {str(error).splitlines()[0]}") from None
