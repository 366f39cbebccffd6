"""Cut a text file into chunks that can be tokenized apart, with the same result as the whole."""

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 21


def iter_chunks(path: Path | str, special_tokens: tuple[str, ...], chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (start, end) byte offsets that cover the file, each chunk the shortest possible from `chunk_bytes` on.

    A chunk ends where a special token begins, or a space or newline after a character that is no white space: no pretoken
    of the GPT-2 pattern crosses such a place, and none before it depends on what follows. Else the file is one chunk.
    """
    specials = tuple(token.encode() for token in special_tokens)
    candidates = re.compile(b"|".join([b"[ \n]", *map(re.escape, specials)]))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        while start < len(data):
            end = start + chunk_bytes
            while (found := candidates.search(data, end)) and not _is_border(data, found.start(), specials):
                end = found.start() + 1
            end = found.start() if found else len(data)
            yield start, end
            start = end


def _is_border(data: mmap.mmap, position: int, specials: tuple[bytes, ...]) -> bool:
    for token in specials:
        # Within these bounds the token can only lie across the position: part of it on either side.
        if data.find(token, max(0, position - len(token) + 1), position + len(token) - 1) >= 0:
            return False
    if any(data[position : position + len(token)] == token for token in specials):
        return True
    # White space outside ASCII is white space to the pattern too, and would join the run after it.
    before = data[max(0, position - 4) : position].decode(errors="replace")
    return not before[-1].isspace()


def read_chunk(path: Path | str, start: int, end: int) -> str:
    """Return the bytes from `start` to `end` of the file as text; what is not UTF-8 becomes U+FFFD."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start).decode(errors="replace")
