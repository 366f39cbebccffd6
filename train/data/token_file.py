"""Token files: the ids of a text on disk.

A token file begins with a JSON line, padded with spaces to 4,096 bytes: the `TokenHeader`, which describes the ids and their
text. The ids follow as little-endian uint16, or as uint32 if the vocabulary is larger than 65,536.

A marked file is a second format, in which a byte of marks follows each id. `tokenizer/chats.py` defines the marks.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import dacite
import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ...files import atomic_file, require_file
from ...tokenizer import token_dtype

FORMAT, MARKED_FORMAT = "tilewright-tokens-2", "tilewright-marked-tokens-1"
HEADER_BYTES = 4096
_MARKED = "+marks"
DTYPES: dict[str, "np.dtype[Any]"] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
DTYPES |= {name + _MARKED: np.dtype([("id", dtype), ("marks", "u1")]) for name, dtype in DTYPES.items()}
_HASH_BYTES = 1 << 22


@dataclass(frozen=True)
class FileStamp:
    """A cheap identity of a file. If it differs, as it does for a copy, only a hash of the contents can decide."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Return the stamp of the file at `path`."""
        stat = path.stat()
        return cls(path.name, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class TokenHeader:
    """The header of a token file."""

    dtype: str
    num_tokens: int
    sha256: str
    """The hash of the ids as they are stored."""
    vocab_size: int
    tokenizer: str
    """The fingerprint of the tokenizer."""
    text_bytes: int = 0
    text_sha256: str = ""
    """The hash of the text; for a plain file, the hash of its bytes."""
    text_file: FileStamp | None = None
    """The text file when it was encoded; None if the ids do not come from a file."""
    format: str = FORMAT

    @property
    def marked(self) -> bool:
        """Whether each id has a byte of marks."""
        return self.dtype.endswith(_MARKED)


class TokenWriter:
    """Writes ids to a token file, or to a marked token file. `header` describes the ids of the last save.

    `file` is open for reading and writing. `resumed` is an earlier header of the file: the writer keeps the ids that it covers,
    and truncates the rest.
    """

    def __init__(
        self, file: BinaryIO, vocab_size: int, tokenizer: str, resumed: TokenHeader | None = None, *, marked: bool = False
    ) -> None:
        self._file, self._digest = file, hashlib.sha256()
        name, format = token_dtype(vocab_size).name, FORMAT
        if marked:
            name, format = name + _MARKED, MARKED_FORMAT
        self._dtype = DTYPES[name]
        self.header = resumed or TokenHeader(name, 0, self._digest.hexdigest(), vocab_size, tokenizer, format=format)
        kept = self.header.num_tokens * self._dtype.itemsize
        if resumed is None:
            file.truncate(0)
        file.seek(HEADER_BYTES)
        _hash_file(file, kept, self._digest)
        if self._digest.hexdigest() != self.header.sha256:
            raise ValueError("the hash of the ids in the file differs from its header")
        self._num_tokens = self.header.num_tokens
        file.truncate(HEADER_BYTES + kept)
        file.seek(HEADER_BYTES + kept)

    def append(self, ids: np.ndarray, marks: np.ndarray | None = None) -> None:
        """Append ids (n,), for a marked file with marks (n,) uint8. Raises a `UserError` for an id outside the vocabulary."""
        # Before the cast, which could turn an invalid id into a valid one.
        if len(ids) and not 0 <= (low := int(ids.min())) <= (high := int(ids.max())) < self.header.vocab_size:
            raise UserError(f"token {low if low < 0 else high} is outside the vocabulary of {self.header.vocab_size}")
        if marks is None:
            data = np.ascontiguousarray(ids, self._dtype).data
        else:
            records = np.empty(len(ids), self._dtype)
            records["id"], records["marks"] = ids, marks
            data = records.view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self._num_tokens += len(ids)

    def save(self, text_bytes: int = 0, text_sha256: str = "", text_file: FileStamp | None = None) -> TokenHeader:
        """Sync the ids to the disk, then write the header of all ids so far, and return it."""
        old = self.header
        num_tokens, sha256 = self._num_tokens, self._digest.hexdigest()
        self.header = TokenHeader(
            old.dtype, num_tokens, sha256, old.vocab_size, old.tokenizer, text_bytes, text_sha256, text_file, old.format
        )
        line = json.dumps(asdict(self.header)).encode()
        if len(line) >= HEADER_BYTES:
            raise UserError(f"the header of a token file has {len(line)} bytes: at most {HEADER_BYTES - 1} are allowed")
        # In this order, so that a header never covers ids that a crash could lose.
        self._file.flush()
        os.fsync(self._file.fileno())
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(line.ljust(HEADER_BYTES - 1) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(end)
        return self.header


def write_tokens(path: Path, arrays: Iterable[np.ndarray], vocab_size: int, tokenizer: str = "") -> TokenHeader:
    """Write the ids of `arrays`, in order, to a token file. `path` appears only when it is complete.

    `tokenizer` is the fingerprint of the tokenizer.
    """
    with atomic_file(path) as file:
        writer = TokenWriter(file, vocab_size, tokenizer)
        for array in arrays:
            writer.append(array)
        return writer.save()


def read_header(file: BinaryIO | FileIO, path: Path) -> TokenHeader:
    """Return the header of an open token file. Raises a `UserError` that names `path` if there is no valid header."""
    try:
        values = json.loads(file.read(HEADER_BYTES))
        format = values.get("format") if isinstance(values, dict) else None
        if format not in (FORMAT, MARKED_FORMAT) and str(format).startswith(("tilewright-tokens-", "tilewright-marked-")):
            raise UserError(f"{path} is a token file of another version, {format}; remove it to encode it again")
        header = dacite.from_dict(TokenHeader, values, dacite.Config(strict=True))
        dtype = token_dtype(header.vocab_size).name
        expected = (dtype + _MARKED, MARKED_FORMAT) if header.marked else (dtype, FORMAT)
        if (header.dtype, header.format) != expected or header.num_tokens < 0:
            raise ValueError
    except (ValueError, TypeError, AttributeError, dacite.DaciteError) as error:
        raise UserError(f"{path} is not a token file; create one with `tilewright tokenizer encode`") from error
    return header


class TokenDataset:
    """The ids of a token file.

    The file is read, not memory-mapped, because truncation of a mapped file raises SIGBUS. Each read first checks that the file
    has not changed since it was opened: by size and modification time, or by its hash if these differ.
    """

    def __init__(self, path: Path | str) -> None:
        """Open `path`. Raises a `UserError` if it is not a complete token file."""
        self.path = require_file(path, "token file")
        with self._open() as file:
            self.header = read_header(file, self.path)
            self.stamp = self._stamp_of(file)
        self._dtype = DTYPES[self.header.dtype]
        self._check_size(self.stamp)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.header.num_tokens

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the `length` ids from each of `starts`, as int64 (len(starts), length).

        Raises a `UserError` if the file was removed, truncated or changed since it was opened, or if it holds an id outside its
        vocabulary.
        """
        records = self.records(starts, length)
        return (records["id"] if self.header.marked else records).astype(np.int64)

    def records(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the same as `windows` in the dtype of the file; a marked file has records of `id` and `marks`."""
        return self.spans(starts, np.full(len(starts), length)).reshape(len(starts), length)

    def spans(self, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return the concatenated records of spans with the given `starts` and `sizes`: (sum of sizes,)."""
        self._require_inside(starts, sizes)
        found = np.empty(int(sizes.sum()), self._dtype)
        rest = found.view(np.uint8).data
        with self._open() as file:
            self._check_unchanged(file)
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                file.seek(HEADER_BYTES + start * self._dtype.itemsize)
                wanted, rest = rest[: size * self._dtype.itemsize], rest[size * self._dtype.itemsize :]
                while wanted:
                    if not (count := file.readinto(wanted)):
                        raise UserError(f"{self.path} was truncated while it was read; encode its text again")
                    wanted = wanted[count:]
        ids = found["id"] if self.header.marked else found
        if (high := ids.max(initial=0)) >= self.header.vocab_size:
            raise UserError(
                f"{self.path} holds token {high}, outside its vocabulary of {self.header.vocab_size}; encode its text again"
            )
        return found

    def _require_inside(self, starts: np.ndarray, sizes: np.ndarray) -> None:
        if len(starts) and not 0 <= starts.min() <= (starts + sizes).max() <= len(self):
            raise ValueError(f"starts from {starts.min()} to {starts.max()}: {sizes.max()} of {len(self)} tokens do not fit")

    @property
    def files(self) -> "tuple[TokenDataset, ...]":
        """The token files that hold the ids: this file."""
        return (self,)

    def verify(self, after_piece: Callable[[int], object] | None = None) -> None:
        """Hash all ids. Raises a `UserError` if the hash differs from the header.

        `after_piece` is called with the number of bytes after each piece, and may raise; the default is a progress bar.
        """
        with self._open() as file:
            self._verify(file, after_piece)

    def _open(self) -> FileIO:
        try:
            return FileIO(self.path)
        except OSError as error:
            raise UserError(f"cannot read token file {self.path}: {error.strerror}") from error

    def _stamp_of(self, file: FileIO) -> FileStamp:
        stat = os.fstat(file.fileno())
        return FileStamp(self.path.name, stat.st_size, stat.st_mtime_ns)

    def _check_size(self, stamp: FileStamp) -> None:
        expected = HEADER_BYTES + self.header.num_tokens * self._dtype.itemsize
        if stamp.size != expected:
            raise UserError(f"{self.path} has {stamp.size} bytes: expected {expected} by its header; encode its text again")

    def _check_unchanged(self, file: FileIO) -> None:
        stamp = self._stamp_of(file)
        if stamp != self.stamp:
            self._check_size(stamp)
            self._verify(file)
            self.stamp = stamp

    def _verify(self, file: FileIO, after_piece: Callable[[int], object] | None = None) -> None:
        if after_piece is None:
            with tqdm(total=self.stamp.size, desc=f"checking {self.path.name}", unit="B", unit_scale=True, disable=None) as bar:
                self._verify(file, bar.update)
            return
        digest = hashlib.sha256()
        file.seek(HEADER_BYTES)
        try:
            _hash_file(file, self.stamp.size - HEADER_BYTES, digest, after_piece)
        except OSError as error:
            raise UserError(f"cannot read token file {self.path}: {error.strerror}") from error
        if digest.hexdigest() != self.header.sha256:
            raise UserError(f"{self.path} has changed: the hash of its ids differs from its header; encode its text again")


def _hash_file(
    file: BinaryIO | FileIO, size: int, digest: "hashlib._Hash", after_piece: Callable[[int], object] | None = None
) -> None:
    # A file that is large relative to memory would evict useful pages from the page cache.
    drops_pages = hasattr(os, "posix_fadvise") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    while size and (data := file.read(min(size, _HASH_BYTES))):
        digest.update(data)
        size -= len(data)
        if drops_pages:
            os.posix_fadvise(file.fileno(), file.tell() - len(data), len(data), os.POSIX_FADV_DONTNEED)
        if after_piece is not None:
            after_piece(len(data))
