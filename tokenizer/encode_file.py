"""Encode a text of any size to arrays of ids."""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from .reading import AnyTokenizer
from .text.patterns import PATTERNS
from .text.sources import BLOCK_BYTES, Block, Inputs, iter_blocks, resolve, text_bytes
from .tokenizer import Tokenizer
from .workers import POOL_BYTES, choose_workers, map_in_threads, ordered_map


def iter_encoded(
    inputs: Inputs, tokenizer: AnyTokenizer, num_workers: int | None = None, *, chunk_bytes: int = BLOCK_BYTES
) -> Iterator[np.ndarray]:
    """Return an iterator over the ids of a text file, in order: arrays of shape (n,) of `token_dtype(tokenizer.vocab_size)`.

    Joined, the arrays are `tokenizer.encode` of the whole text, for any `num_workers` (None: the machine's cores, one
    for a small file) and `chunk_bytes`. Memory: a few chunks a worker. The file is read as UTF-8, what is not UTF-8 as
    U+FFFD. Several files, documents in tables and others that `sources.py` knows are encoded each for itself. Workers are
    threads for the patterns that have a compiled scanner and for `HuggingFaceTokenizer`, and processes for any other. A
    missing or empty file raises a `UserError`.
    """
    inputs = resolve(inputs)
    size = text_bytes(inputs)
    num_workers = choose_workers(num_workers, POOL_BYTES if size is None else size)
    blocks = iter_blocks(inputs, tuple(tokenizer.special_tokens), pattern=tokenizer.pattern, block_bytes=chunk_bytes)
    return (ids for _, ids in encode_blocks(blocks, size, tokenizer, num_workers))


def encode_blocks(
    blocks: Iterator[Block], size: int | None, tokenizer: AnyTokenizer, num_workers: int, done: int = 0
) -> Iterator[tuple[Block, np.ndarray]]:
    """Yield each block of a text with its ids, in order, under a progress bar of `size` bytes of which `done` are done."""
    if size is not None:
        tokenizer.expect(size - done)
    if not isinstance(tokenizer, Tokenizer) or tokenizer.pattern in PATTERNS:
        results = map_in_threads(tokenizer.encode_block, blocks, num_workers)
    else:
        results = ordered_map(_encode_block, tokenizer, blocks, num_workers)
    with tqdm(total=size, initial=done, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        for block, ids in results:
            yield block, ids
            bar.update(len(block.data))


def _encode_block(tokenizer: Tokenizer, block: Block) -> np.ndarray:
    return tokenizer.encode_block(block)
