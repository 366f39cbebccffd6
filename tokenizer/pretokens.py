"""Count the distinct pretokens of a text file."""

from collections import Counter
from pathlib import Path

from tqdm import tqdm

from ..files import require_file
from .chunks import CHUNK_BYTES, iter_chunks, read_chunk
from .patterns import split_pretokens
from .workers import choose_workers, ordered_map


def count_pretokens(
    path: Path | str,
    special_tokens: tuple[str, ...] = (),
    *,
    num_workers: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Counter[str]:
    """Return how often each pretoken occurs in the file; special tokens bound pretokens and are not counted.

    The counts do not depend on `num_workers` (None: the machine's cores, one for a small file) or `chunk_bytes`. The
    file is read as UTF-8, what is not UTF-8 as U+FFFD. A missing or empty file raises a `UserError`.
    """
    path = require_file(path, "text file").resolve()
    size = path.stat().st_size
    counts: Counter[str] = Counter()
    chunks = iter_chunks(path, special_tokens, chunk_bytes)
    results = ordered_map(_count_chunk, (path, special_tokens), chunks, choose_workers(num_workers, size))
    with tqdm(total=size, desc="counting pretokens", unit="B", unit_scale=True, disable=None) as bar:
        for (start, end), found in results:
            counts.update(found)
            bar.update(end - start)
    return counts


def _count_chunk(shared: tuple[Path, tuple[str, ...]], chunk: tuple[int, int]) -> Counter[str]:
    path, special_tokens = shared
    counts: Counter[str] = Counter()
    for run, _ in split_pretokens([read_chunk(path, *chunk)], special_tokens):
        counts.update(run)
    return counts
