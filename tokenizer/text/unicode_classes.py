"""The classes of characters that the patterns tell apart, as a table over all code points.

The table is shipped: of the patterns with a name, ids are the same on all machines, whatever Unicode the `regex` there knows.
A pattern of one's own goes through that `regex`: if it classifies characters otherwise, the fingerprint differs. With another
table tokenizers would give other ids under the same fingerprint, so there is no next one without another name for its patterns.
"""

import base64
import hashlib
import zlib
from functools import cache

import numpy as np
import regex

from .unicode_runs import RUNS

LETTER, NUMBER, SPACE = 1, 2, 4
# What o200k calls upper and lower case; letters without case and marks are both.
UPPER, LOWER = 8, 16
# Punctuation and symbols; Han and kana, as DeepSeek has them, in addition to the other bits.
SYMBOL, HAN_KANA = 32, 64

_BITS = {
    r"\p{Lu}": LETTER | UPPER,
    r"\p{Lt}": LETTER | UPPER,
    r"\p{Ll}": LETTER | LOWER,
    r"\p{Lm}": LETTER | UPPER | LOWER,
    r"\p{Lo}": LETTER | UPPER | LOWER,
    r"\p{M}": UPPER | LOWER,
    r"\p{N}": NUMBER,
    r"\s": SPACE,
    r"[\p{P}\p{S}]": SYMBOL,
}
# Letters for the most part, but the marks and symbols among kana as well.
_HAN_KANA = ("一龥", "\u3040\u309f", "\u30a0\u30ff")


@cache
def class_table() -> np.ndarray:
    """Return the bits of each code point: uint8 of shape (0x110000,), read-only; the same for every version of `regex`."""
    table = unpacked(RUNS)
    table.setflags(write=False)
    return table


def classes_by_regex() -> np.ndarray:
    """Return the table as the installed `regex` has it."""
    table = np.zeros(0x110000, np.uint8)
    # No valid UTF-8 has surrogates. Of the rest, most is no character, and is sorted out by one search instead of eight.
    rest = np.concatenate((np.arange(0x100, 0xD800, dtype="<u4"), np.arange(0xE000, 0x110000, dtype="<u4")))
    latin = "".join(map(chr, range(0x100)))
    characters = latin + "".join(regex.findall(r"\P{C}+", rest.tobytes().decode("utf-32-le")))
    for members, bits in _BITS.items():
        found = "".join(regex.findall(f"{members}+", characters))
        table[np.frombuffer(found.encode("utf-32-le"), "<u4")] = bits
    for first, last in _HAN_KANA:
        table[ord(first) : ord(last) + 1] |= HAN_KANA
    return table


def unicode_of_regex() -> str | None:
    """Return the sha256, in hex, of the classes of the installed `regex`, or None where they are those of the table."""
    classes = classes_by_regex()
    return None if np.array_equal(classes, class_table()) else hashlib.sha256(classes.tobytes()).hexdigest()


def packed_runs(table: np.ndarray) -> str:
    """Return what `unicode_runs.py` holds of a table: its runs of equal bits, 24 bits of length above them."""
    starts = np.concatenate(([0], np.flatnonzero(np.diff(table)) + 1))
    lengths = np.diff(np.concatenate((starts, [len(table)])))
    return base64.b85encode(zlib.compress((lengths << 8 | table[starts]).astype("<u4").tobytes(), 9)).decode()


def unpacked(runs: str) -> np.ndarray:
    """Return the table that `packed_runs` was given."""
    words = np.frombuffer(zlib.decompress(base64.b85decode(runs)), "<u4")
    return np.repeat((words & 0xFF).astype(np.uint8), words >> 8)
