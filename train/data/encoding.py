"""Conversion of text to token files and back. Encoding is parallel and resumable."""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ...files import make_folder, refused_writes, require_absent, require_file
from ...tokenizer import END_OF_TEXT, AnyTokenizer
from ...tokenizer.encode_file import Advance, encode_blocks, progress
from ...tokenizer.text.sources import Block, iter_blocks, text_bytes
from ...tokenizer.workers import POOL_BYTES, choose_workers
from .token_file import FileStamp, TokenDataset, TokenHeader, TokenWriter, read_header

# Bytes of text between two saves: a few seconds of work.
SAVE_EVERY = 1 << 26


def encode_text(
    text: Path,
    tokenizer: AnyTokenizer,
    out: Path,
    num_workers: int | None = None,
    *,
    save_every: int = SAVE_EVERY,
    advance: Advance | None = None,
) -> TokenHeader:
    """Encode a text file to the token file `out`, in parallel. `out` appears only when it is complete.

    `<|endoftext|>`, if it is a special token, follows each document of JSON lines or Parquet. `advance` is called with the
    number of bytes of text after each block; the default is a progress bar.

    Ids are written to `OUT.part`, which is saved every `save_every` bytes of text. A second call after an interruption resumes
    from the last save and gives the same bytes. It restarts if the text, the tokenizer or the ids have changed. If several
    processes encode to the same file, one encodes and the others wait.

    Raises a `UserError` if `out` exists, or if the text is missing, cannot be read, or changes during the call.
    """
    require_file(text, "text file", "make a corpus with `tilewright corpus`")
    require_absent(out)
    with refused_writes(out):
        make_folder(out.parent)
    part = out.with_name(f"{out.name}.part")
    with _locked(part, text) as file:
        if out.exists():
            # Another process has written it while this one waited for the lock.
            part.unlink()
            return TokenDataset(out).header
        try:
            header = _encode(text, tokenizer, file, part, num_workers, save_every, advance)
            require_absent(out)
            # A crash may undo the rename. The complete .part file then exists again.
            part.replace(out)
        except BaseException:
            if not _is_saved(part):
                part.unlink(missing_ok=True)
            raise
    return header


def _encode(
    text: Path,
    tokenizer: AnyTokenizer,
    file: BinaryIO,
    part: Path,
    num_workers: int | None,
    save_every: int,
    advance: Advance | None,
) -> TokenHeader:
    stamp, size = FileStamp.of(text), text_bytes(text)
    num_workers = choose_workers(num_workers, POOL_BYTES if size is None else size)
    writer, blocks, digest = _begin(text, tokenizer, file, part, stamp, advance)
    done = saved = writer.header.text_bytes
    for block, ids in encode_blocks(blocks, size, tokenizer, num_workers, done, advance):
        writer.append(ids)
        digest.update(block.data.data)
        done += len(block.data)
        if done - saved >= save_every:
            writer.save(done, digest.hexdigest(), stamp)
            saved = done
    if FileStamp.of(text) != stamp:
        raise UserError(f"cannot encode {text}: the file changed in the meantime; encode it again")
    return writer.save(done, digest.hexdigest(), stamp)


def _begin(
    text: Path, tokenizer: AnyTokenizer, file: BinaryIO, part: Path, stamp: FileStamp, advance: Advance | None
) -> "tuple[TokenWriter, Iterator[Block], hashlib._Hash]":
    """Return a writer, the remaining blocks of text, and the hash of the blocks that are already encoded."""

    def blocks() -> Iterator[Block]:
        end = END_OF_TEXT if tokenizer.end_of_text_id is not None else ""
        return iter_blocks(text, tuple(tokenizer.special_tokens), pattern=tokenizer.pattern, document_end=end)

    if (writer := _writer_of(file, part, tokenizer, stamp)) is not None:
        rest, digest = blocks(), hashlib.sha256()
        _skip(rest, writer.header.text_bytes, digest, advance)
        if digest.hexdigest() == writer.header.text_sha256:
            return writer, rest, digest
    return TokenWriter(file, tokenizer.vocab_size, tokenizer.fingerprint), blocks(), hashlib.sha256()


def _writer_of(file: BinaryIO, part: Path, tokenizer: AnyTokenizer, stamp: FileStamp) -> TokenWriter | None:
    """Return a writer that appends to the file, or None if the file does not hold a prefix of this text by this tokenizer."""
    try:
        header = read_header(file, part)
        if (header.text_file, header.tokenizer, header.vocab_size) == (stamp, tokenizer.fingerprint, tokenizer.vocab_size):
            return TokenWriter(file, tokenizer.vocab_size, tokenizer.fingerprint, header)
    except (UserError, ValueError):
        pass
    return None


def _skip(blocks: Iterator[Block], size: int, digest: "hashlib._Hash", advance: Advance | None) -> None:
    # Reading is cheap compared to encoding. It also gives the hash, and works for compressed text, which has no seek.
    with progress("skipping encoded text", size, advance=advance) as advance:
        while size > 0:
            block = next(blocks, None)
            if block is None:
                return
            digest.update(block.data.data)
            advance(len(block.data))
            size -= len(block.data)


def _is_saved(part: Path) -> bool:
    # Opens the file again: a flush of the failed file object would fail once more.
    try:
        with part.open("rb") as file:
            read_header(file, part)
    except (UserError, OSError):
        return False
    return True


@contextmanager
def _locked(path: Path, text: Path) -> Iterator[BinaryIO]:
    """Yield the file at `path` under an exclusive lock. Creates the file if it is missing."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write to {path.parent}: {error.strerror}; encode {text} with `tilewright tokenizer encode {text} "
                f"--out FOLDER/{text.stem}.tokens`, and use that file instead of the text"
            ) from error
        with os.fdopen(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"waiting for another process that encodes {text}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if not os.fstat(file.fileno()).st_size:
                    path.unlink(missing_ok=True)
                raise UserError(f"cannot lock {path}: {error.strerror}; encode {text} on another disk") from error
            if _is_file_at(path, file):
                yield file
                return


def _is_file_at(path: Path, file: BinaryIO) -> bool:
    # The previous holder of the lock may have renamed or removed the file.
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def text_sha256(text: Path, document_end: str = "") -> str:
    """Return the SHA-256 of a text, as in `TokenHeader.text_sha256`, with a progress bar.

    `document_end` is passed to `iter_blocks`.
    """
    digest = hashlib.sha256()
    with tqdm(total=text_bytes(text), desc=f"checking {text.name}", unit="B", unit_scale=True, disable=None) as bar:
        for block in iter_blocks(text, document_end=document_end):
            digest.update(block.data.data)
            bar.update(len(block.data))
    return digest.hexdigest()


def decode_text(dataset: TokenDataset, tokenizer: AnyTokenizer, piece_tokens: int = 2**16) -> Iterator[bytes]:
    """Yield the text of a token file in pieces, as bytes, because the text may contain invalid UTF-8."""
    decoder = tokenizer.stream_decoder("surrogateescape")
    for start in range(0, len(dataset), piece_tokens):
        length = min(piece_tokens, len(dataset) - start)
        yield decoder.decode(dataset.windows(np.array([start]), length)[0]).encode(errors="surrogateescape")
    yield decoder.finish().encode(errors="surrogateescape")
