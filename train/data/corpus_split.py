"""Splitting of a text into training and validation text, by a hash of each document."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import UserError
from ...files import atomic_file, require_absent
from ...tokenizer import END_OF_TEXT, Files
from ...tokenizer.text.sources import resolve, text_bytes
from ...tokenizer.text.streams import open_stream

_MARK = END_OF_TEXT.encode()
_READ_BYTES = 1 << 20
_MAX_DOCUMENT_BYTES = 1 << 30
_TABLES = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Split:
    """The number of documents and bytes on each side of a split."""

    train_documents: int
    train_bytes: int
    valid_documents: int
    valid_bytes: int


def split_corpus(texts: Sequence[Path | str], folder: Path, valid_share: float) -> Split:
    """Write each document of `texts` to train.txt or valid.txt in `folder`. `END_OF_TEXT` separates documents.

    The SHA-256 of a document's bytes, without surrounding white space, decides its side. The side is therefore independent of
    the order and of the other documents, duplicates fall on the same side, and a larger `valid_share` only adds documents to
    the validation text. Documents keep their bytes and their order; blank documents are dropped. `texts` are files, folders or
    globs of plain text, .gz or .zst. Needs memory for the largest document.

    Raises a `UserError` if an output file exists, a side is empty, a document is larger than 1 GiB, or `valid_share` is not
    between 0 and 1.
    """
    if not 0 < valid_share < 1:
        raise UserError(f"valid_share is {valid_share}: it must be between 0 and 1")
    outputs = [require_absent(folder / name) for name in ("train.txt", "valid.txt")]
    paths = [Path(source.path) for source in resolve([*texts]) if isinstance(source, Files)]
    for path in paths:
        if path.suffix.lower() in _TABLES or Path(path.stem).suffix.lower() in _TABLES:
            raise UserError(f"{path} is a table of documents: expected plain text with {END_OF_TEXT} after each document")
    below = int(valid_share * 2**64)
    documents, sizes = [0, 0], [0, 0]
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(output)) for output in outputs]
        bar = stack.enter_context(tqdm(total=text_bytes([*paths]), desc="splitting", unit="B", unit_scale=True, disable=None))
        for document in (document for path in paths for document in _documents(path, bar)):
            text = document.removesuffix(b"\n").removesuffix(_MARK).strip()
            if text:
                side = int(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < below)
                files[side].write(document)
                documents[side] += 1
                sizes[side] += len(document)
        if 0 in documents:
            total, side = sum(documents), "valid.txt" if documents[0] else "train.txt"
            raise UserError(f"valid_share is {valid_share}: none of {total} documents would be in {side}; choose another value")
    return Split(documents[0], sizes[0], documents[1], sizes[1])


def _documents(path: Path, bar: "tqdm[Any]") -> Iterator[bytes]:
    """Yield each document with its end mark and the newline after the mark. Adds a missing mark to the last document."""
    held = bytearray()
    with open_stream(path) as stream:
        while data := stream.read(_READ_BYTES):
            bar.update(len(data))
            # A mark may cross the border of two reads, or its newline may be in the second read.
            searched = max(0, len(held) - len(_MARK))
            held += data
            start = 0
            while (place := held.find(_MARK, max(start, searched))) >= 0:
                end = place + len(_MARK)
                if end == len(held):
                    break
                end += held[end : end + 1] == b"\n"
                yield bytes(held[start:end])
                start = end
            del held[:start]
            if len(held) > _MAX_DOCUMENT_BYTES:
                raise UserError(f"{path} has a document of more than 1 GiB: expected {END_OF_TEXT} after each document")
    if held:
        whole = held.endswith(_MARK)
        yield bytes(held) if whole else bytes(held.removesuffix(b"\n")) + b"\n" + _MARK + b"\n"
