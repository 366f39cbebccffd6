"""Encode a text of any size to arrays of ids."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """Return an iterator over the ids of a text file, in order, as arrays of shape (n,).

    The dtype is `token_dtype(tokenizer.vocab_size)`. The concatenated arrays equal `tokenizer.encode` of the whole text, for
    any `num_workers` (None: one per core, or one for a small file) and `chunk_bytes`. A worker holds a few chunks in memory.
    Invalid UTF-8 becomes U+FFFD. Several inputs (see `sources.py` for the kinds) are encoded separately. Workers are threads
    for the patterns with a compiled scanner and for `HuggingFaceTokenizer`, and processes for other patterns. A missing or
    empty file raises a `UserError`.
    """
    inputs = resolve(inputs)
    size = text_bytes(inputs)
    num_workers = choose_workers(num_workers, POOL_BYTES if size is None else size)
    blocks = iter_blocks(inputs, tuple(tokenizer.special_tokens), pattern=tokenizer.pattern, block_bytes=chunk_bytes)
    return (ids for _, ids in encode_blocks(blocks, size, tokenizer, num_workers))


Advance = Callable[[int], object]
"""Called with the number of bytes of each finished block; an exception from it stops the encoding."""


def encode_blocks(
    blocks: Iterator[Block],
    size: int | None,
    tokenizer: AnyTokenizer,
    num_workers: int,
    done: int = 0,
    advance: Advance | None = None,
) -> Iterator[tuple[Block, np.ndarray]]:
    """Yield each block of a text with its ids, in order.

    `size` is the size of the text in bytes, of which `done` are encoded already. `advance` is called with the size of each
    block; without it, a progress bar is shown.
    """
    if size is not None:
        tokenizer.expect(size - done)
    if isinstance(tokenizer, Tokenizer) and not encodes_in_threads(tokenizer):
        results = ordered_map(_encode_block, tokenizer, blocks, num_workers)
    else:
        results = map_in_threads(tokenizer.encode_block, blocks, num_workers)
    with progress("encoding", size, done, advance) as advance:
        for block, ids in results:
            yield block, ids
            advance(len(block.data))


@contextmanager
def progress(what: str, size: int | None, done: int = 0, advance: Advance | None = None) -> Iterator[Advance]:
    """Yield `advance`, or the update function of a new progress bar of `size` bytes if it is None."""
    if advance is not None:
        yield advance
        return
    with tqdm(total=size, initial=done, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


def encodes_in_threads(tokenizer: AnyTokenizer) -> bool:
    """Return whether encoding releases the GIL: with a compiled scanner, or in another library."""
    return not isinstance(tokenizer, Tokenizer) or tokenizer.pattern in PATTERNS


def _encode_block(tokenizer: Tokenizer, block: Block) -> np.ndarray:
    return tokenizer.encode_block(block)
