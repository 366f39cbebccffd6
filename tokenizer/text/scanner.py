"""Compiled scanners that find the ends of pretokens, for the named patterns, in valid UTF-8.

The strings in `patterns.py`, run by `regex`, are the specification. A scanner starts at a border between pretokens and needs
no text before it. For each pattern, a function finds the end of one pretoken. GPT-2's pattern has a second, faster
implementation: it turns 64 bytes at a time into bit masks, one bit a byte, and computes the borders arithmetically.

The ends of documents are passed as empty special tokens.
"""

from typing import Any, Protocol

import numpy as np

from ..compiled.intrinsics import class_masks, load8, trailing_zeros
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, compiled, helper, int64, uint64
from .characters import (
    BLANK,
    class_at,
    contraction_end,
    run_of,
    run_of_others,
    segment_end,
    space_end,
    special_from,
)
from .deepseek import scan_deepseek
from .specials import NO_SPECIALS
from .unicode_classes import LETTER, NUMBER, SPACE, class_table
from .word_patterns import scan_letter_words, scan_words_by_case

_ONE = np.uint64(1)
_ALL = ~np.uint64(0)


class Scanner(Protocol):
    """The signature of the functions that `scanner_of` returns."""

    def __call__(self, data: np.ndarray, start: int, end: int, ends: np.ndarray, specials: np.ndarray = NO_SPECIALS) -> int:
        """Write the end of each pretoken of `data[start:end]`, as an offset in `data`, to `ends`; return their number.

        `data` is uint8 and valid UTF-8 (see `utf8.py`), `ends` int64. The scan stops when `ends` is full; to continue, start
        from the last end. `specials` are special tokens as `SpecialFinder.find` returns them. Each is a border, and its own
        end is written as a negative number. Releases the GIL.
        """
        ...


def scanner_of(name: str) -> Scanner:
    """Return the compiled scanner of a pattern in `PATTERNS`; another name raises a `KeyError`."""
    scan, *parameters = _SCANNERS[name]
    table = class_table()

    def scanner(data: np.ndarray, start: int, end: int, ends: np.ndarray, specials: np.ndarray = NO_SPECIALS) -> int:
        return scan(data, start, end, ends, table, specials, *parameters)

    return scanner


def compiled_scanner(name: str) -> Any:
    """Return the compiled function behind `scanner_of`, to decide whether to compile it."""
    return _SCANNERS[name][0]


@helper
def next_gpt2(data, i, end, table):
    """Return the end of the pretoken of GPT-2's pattern that starts at i."""
    after = contraction_end(data, i, end, False)
    if after > i:
        return after
    begin = i + 1 if load8(data, i) == BLANK and i + 1 < end else i
    found, after = class_at(data, begin, table)
    if found & SPACE:
        return space_end(data, i, end, table, False, True)
    if found & (LETTER | NUMBER):
        return run_of(found & (LETTER | NUMBER), data, after, end, table)
    return run_of_others(data, after, end, table)


@helper
def borders_gpt2(data, i, remaining, table):
    """Return a mask of the borders between pretokens in the 64 bytes from the border i, or 0 if none is certain.

    The text continues for `remaining` bytes, and its end is a border too. More borders may exist above the highest set bit.
    """
    letter, digit, space, blank, apostrophe, foreign = class_masks(data, i)
    # A border at q depends on bytes q - 1, q and q + 1; a contraction at q moves a border to q + 3.
    limit = int64(61)
    valid = _ALL
    if remaining < 64:
        limit = min(limit, remaining + 1)
        valid = (_ONE << uint64(remaining)) - _ONE
        letter &= valid
        digit &= valid
        space &= valid
        foreign &= valid
    while foreign:
        q = trailing_zeros(foreign)
        if q > 60:
            limit = min(limit, q - 1)
            break
        found, after = class_at(data, i + q, table)
        if found & SPACE:
            limit = min(limit, q - 1)
            break
        character = ((_ONE << uint64(after - i - q)) - _ONE) << uint64(q)
        if found & LETTER:
            letter |= character
        elif found & NUMBER:
            digit |= character
        foreign &= ~character
    if limit < 2:
        return uint64(0)
    other = valid & ~(letter | digit | space)
    change = (letter ^ (letter << _ONE)) | (digit ^ (digit << _ONE)) | (space ^ (space << _ONE)) | (other ^ (other << _ONE))
    # The last character of a run of white space is separate; a space there joins the next pretoken.
    last = space & ~(space >> _ONE)
    if remaining < 64:
        last &= ~(_ONE << uint64(remaining - 1))
    joined = (last & blank) << _ONE
    borders = (change & ~joined) | last
    known = (_ONE << uint64(limit)) - _ONE
    contractions = apostrophe & (borders | _ONE) & known
    while contractions:
        q = trailing_zeros(contractions)
        contractions &= contractions - _ONE
        after = contraction_end(data, i + q, i + remaining, False) - i
        if after > q:
            borders &= ~(uint64(2) << uint64(q))
            borders |= _ONE << uint64(after)
    return borders & known & ~_ONE


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS)
def _scan_gpt2(data, start, end, ends, table, specials):
    i, n, k = start, 0, special_from(specials, start)
    while i < end and n < len(ends):
        stop = segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            n += 1
            k += 2
            continue
        borders = uint64(0)
        if i + 64 <= len(data) and n + 64 <= len(ends):
            borders = borders_gpt2(data, i, stop - i, table)
        if borders == 0:
            i = next_gpt2(data, i, stop, table)
            ends[n] = i
            n += 1
        else:
            begin = i
            while borders:
                i = begin + trailing_zeros(borders)
                borders &= borders - _ONE
                ends[n] = i
                n += 1
    return n


# The function of each pattern and its parameters. Patterns that differ only in parameters share machine code.
_SCANNERS: dict[str, tuple[Any, ...]] = {
    "gpt2": (_scan_gpt2,),
    # Digits in a number; whether white space at the end of a text is one pretoken, including line ends.
    "cl100k": (scan_letter_words, 3, True),
    "llama3": (scan_letter_words, 3, False),
    "qwen2": (scan_letter_words, 1, False),
    # Digits in a number; whether contractions end words.
    "o200k": (scan_words_by_case, 3, True),
    "tekken": (scan_words_by_case, 1, False),
    "deepseek-v3": (scan_deepseek,),
}
