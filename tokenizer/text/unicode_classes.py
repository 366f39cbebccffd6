"""The classes of characters that the patterns distinguish, as a table over all code points.

The table is part of the package, so the ids of a named pattern are the same on all machines, independent of the Unicode
version of the installed `regex`. Any other pattern runs in that `regex`; if it classifies characters differently, the
fingerprint differs. Never change the table for existing names: tokenizers would give other ids under the same fingerprint.
"""

import base64
import hashlib
import zlib
from functools import cache

import numpy as np
import regex

from .unicode_runs import RUNS

LETTER, NUMBER, SPACE = 1, 2, 4
# Upper and lower case as in o200k: letters without case and marks have both bits.
UPPER, LOWER = 8, 16
# Punctuation and symbols; Han and kana as in DeepSeek, in addition to the other bits.
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
# Mostly letters, but also the marks and symbols among kana.
_HAN_KANA = ("一龥", "\u3040\u309f", "\u30a0\u30ff")


@cache
def class_table() -> np.ndarray:
    """Return the bits of each code point: uint8 of shape (0x110000,), read-only, independent of the version of `regex`."""
    table = unpacked(RUNS)
    table.setflags(write=False)
    return table


def classes_by_regex() -> np.ndarray:
    """Return the table computed by the installed `regex`."""
    table = np.zeros(0x110000, np.uint8)
    # Valid UTF-8 has no surrogates. Most other code points are unassigned; one search removes them before the eight others.
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
    """Return the sha256, in hex, of the classes of the installed `regex`, or None if they equal the table."""
    classes = classes_by_regex()
    return None if np.array_equal(classes, class_table()) else hashlib.sha256(classes.tobytes()).hexdigest()


def packed_runs(table: np.ndarray) -> str:
    """Return a table as `unicode_runs.py` stores it: runs of equal bits, with 24 bits of length above the bits."""
    starts = np.concatenate(([0], np.flatnonzero(np.diff(table)) + 1))
    lengths = np.diff(np.concatenate((starts, [len(table)])))
    return base64.b85encode(zlib.compress((lengths << 8 | table[starts]).astype("<u4").tobytes(), 9)).decode()


def unpacked(runs: str) -> np.ndarray:
    """Return the table from the output of `packed_runs`."""
    words = np.frombuffer(zlib.decompress(base64.b85decode(runs)), "<u4")
    return np.repeat((words & 0xFF).astype(np.uint8), words >> 8)
