"""The classes of characters that the patterns tell apart, as a table over all code points."""

from functools import cache

import numpy as np
import regex

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
    """Return the bits of each code point: uint8 of shape (0x110000,), read-only. `regex` decides, with its Unicode version."""
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
    table.setflags(write=False)
    return table
