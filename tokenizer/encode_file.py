"""Encode a text file of any size to arrays of ids."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..files import require_file
from .chunks import CHUNK_BYTES, iter_chunks, read_chunk
from .tokenizer import Tokenizer
from .workers import choose_workers, ordered_map


def token_dtype(vocab_size: int) -> np.dtype:
    """Return uint16 where it holds every id of the vocabulary, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def iter_encoded(
    path: Path | str, tokenizer: Tokenizer, num_workers: int | None = None, *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[np.ndarray]:
    """Return an iterator over the ids of the file, in order: arrays of shape (n,) of `token_dtype(tokenizer.vocab_size)`.

    Joined, the arrays are `tokenizer.encode` of the whole text, for any `num_workers` (None: the machine's cores, one
    for a small file) and `chunk_bytes`. Memory: a few chunks a worker. The file is read as UTF-8, what is not UTF-8 as
    U+FFFD. A missing or empty file raises a `UserError`.
    """
    path = require_file(path, "text file").resolve()
    num_workers = choose_workers(num_workers, path.stat().st_size)
    return _encoded_chunks(path, tokenizer, num_workers, chunk_bytes)


def _encoded_chunks(path: Path, tokenizer: Tokenizer, num_workers: int, chunk_bytes: int) -> Iterator[np.ndarray]:
    chunks = iter_chunks(path, tuple(tokenizer.special_tokens), chunk_bytes)
    results = ordered_map(_encode_chunk, (path, tokenizer), chunks, num_workers)
    with tqdm(total=path.stat().st_size, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        for (start, end), ids in results:
            yield ids
            bar.update(end - start)


def _encode_chunk(shared: tuple[Path, Tokenizer], chunk: tuple[int, int]) -> np.ndarray:
    path, tokenizer = shared
    return np.fromiter(tokenizer.encode_iterable([read_chunk(path, *chunk)]), token_dtype(tokenizer.vocab_size))
