"""Where pretokens end: compiled scanners for the three published patterns, over bytes of valid UTF-8.

`regex` and the strings in `patterns.py` are the specification. A scanner begins at a border between pretokens and needs nothing
from before it. Each pattern is a function that finds the end of one pretoken. For GPT-2's there is a second form beside it:
64 bytes at a time become bit masks, one bit a byte, and borders are arithmetic on those.

The ends of documents can be given as special tokens without a byte.
"""

from typing import Any, Protocol

import numpy as np

from ..compiled.intrinsics import class_masks, load8, range_mask, trailing_zeros
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, compiled, helper, int64, uint64
from .specials import NO_SPECIALS
from .unicode_classes import LETTER, LOWER, NUMBER, SPACE, UPPER, class_table

_ONE = np.uint64(1)
_ALL = ~np.uint64(0)
_APOSTROPHE, _BLANK, _NEWLINE, _RETURN, _SLASH = b"' \n\r/"
_LOWER_A, _LOWER_Z, _UPPER_A, _UPPER_Z = b"azAZ"


class Scanner(Protocol):
    """What `scanner_of` returns."""

    def __call__(self, data: np.ndarray, start: int, end: int, ends: np.ndarray, specials: np.ndarray = NO_SPECIALS) -> int:
        """Write the end of each pretoken of `data[start:end]`, an offset in `data`, to `ends`; return how many were written.

        `data` is uint8 and valid UTF-8 (see `utf8.py`), `ends` int64. The scan stops early when `ends` is full: go on from the
        last one. `specials` are the special tokens as `SpecialFinder.find` returns them; each is a border, and its own end is
        written as a negative number. Other threads run meanwhile.
        """
        ...


def scanner_of(name: str) -> Scanner:
    """Return the compiled scanner of the pattern "gpt2", "cl100k" or "o200k"; a `KeyError` for another."""
    scan = _SCANNERS[name]
    table = class_table()

    def scanner(data: np.ndarray, start: int, end: int, ends: np.ndarray, specials: np.ndarray = NO_SPECIALS) -> int:
        return scan(data, start, end, ends, table, specials)

    return scanner


def compiled_scanner(name: str) -> Any:
    """Return the compiled function behind `scanner_of`, for whoever decides whether it is to be compiled."""
    return _SCANNERS[name]


@helper
def _class_at(data, i, table):
    """Return the class of the character at i, and where the next one begins."""
    byte = load8(data, i)
    if byte < 0x80:
        return int64(table[byte]), i + 1
    if byte < 0xE0:
        code, size = (byte & 0x1F) << 6 | (load8(data, i + 1) & 63), 2
    elif byte < 0xF0:
        code, size = (byte & 0x0F) << 12 | (load8(data, i + 1) & 63) << 6 | (load8(data, i + 2) & 63), 3
    else:
        high = (byte & 0x07) << 18 | (load8(data, i + 1) & 63) << 12
        code, size = high | (load8(data, i + 2) & 63) << 6 | (load8(data, i + 3) & 63), 4
    return int64(table[code]), i + size


@helper
def _run_of(bits, data, i, end, table):
    """Return where the characters of any of these classes end that begin at i."""
    while i < end:
        found, after = _class_at(data, i, table)
        if found & bits == 0:
            break
        i = after
    return i


@helper
def _run_of_letters(bits, data, i, end, table):
    """Return what `_run_of` does for LETTER or LOWER; it takes ASCII letters 64 at a time."""
    while i < end:
        if i + 64 <= len(data):
            letters = range_mask(data, i, _LOWER_A, _LOWER_Z)
            if bits == LETTER:
                letters |= range_mask(data, i, _UPPER_A, _UPPER_Z)
            size = trailing_zeros(~letters)
            i += size
            if size == 64:
                continue
            if i >= end:
                break
        found, after = _class_at(data, i, table)
        if found & bits == 0:
            break
        i = after
    # What follows the text in the array may be letters too.
    return min(i, end)


@helper
def _run_of_others(data, i, end, table):
    """Return where the characters end that begin at i and are no letters, numbers or white space."""
    while i < end:
        found, after = _class_at(data, i, table)
        if found & (LETTER | NUMBER | SPACE):
            break
        i = after
    return i


@helper
def _space_end(data, i, end, table, lines, whole):
    r"""Return the end of a pretoken of nothing but white space that begins at i.

    `\s+(?!\S)|\s+`: the run but for its last character, unless the text ends there or it is the only one. Before that comes,
    with `lines`, the run as far as its last line end, unless the text ends after it and `whole` says that it is taken whole.
    """
    last, line, p = i, i, i
    while p < end:
        byte = load8(data, p)
        found, after = _class_at(data, p, table)
        if not found & SPACE:
            break
        if byte in (_NEWLINE, _RETURN):
            line = after
        last, p = p, after
    if lines and line > i and not (whole and p == end):
        return line
    return p if p == end or last == i else last


@helper
def _contraction_end(data, i, end, any_case):
    """Return the end of 's, 'd, 'm, 't, 'll, 've or 're at i, or i where there is none."""
    if i + 1 >= end or load8(data, i) != _APOSTROPHE:
        return i
    first = load8(data, i + 1)
    second = load8(data, i + 2) if i + 2 < end else int64(0)
    if any_case:
        if first == 0xC5 and second == 0xBF:
            return i + 3  # the long s, which is an s when case does not count
        first |= 0x20
        second |= 0x20
    if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
        return i + 2
    if (first == ord("l") and second == ord("l")) or ((first == ord("v") or first == ord("r")) and second == ord("e")):
        return i + 3
    return i


@helper
def _next_gpt2(data, i, end, table):
    after = _contraction_end(data, i, end, False)
    if after > i:
        return after
    begin = i + 1 if load8(data, i) == _BLANK and i + 1 < end else i
    found, after = _class_at(data, begin, table)
    if found & SPACE:
        return _space_end(data, i, end, table, False, True)
    if found & (LETTER | NUMBER):
        return _run_of(found & (LETTER | NUMBER), data, after, end, table)
    return _run_of_others(data, after, end, table)


@helper
def _others_end(data, i, end, table, slash):
    """Return the end of the characters at i that are no letters, numbers or white space, and of line ends and slashes after."""
    i = _run_of_others(data, i, end, table)
    while i < end:
        byte = load8(data, i)
        if byte not in (_NEWLINE, _RETURN) and not (slash and byte == _SLASH):
            break
        i += 1
    return i


@helper
def _number_end(data, i, end, table):
    """Return the end of the up to three number characters at i."""
    for _ in range(3):
        if i < end:
            found, after = _class_at(data, i, table)
            if found & NUMBER:
                i = after
    return i


@helper
def _next_cl100k(data, i, end, table):
    after = _contraction_end(data, i, end, True)
    if after > i:
        return after
    found, after = _class_at(data, i, table)
    if found & LETTER:
        return _run_of_letters(LETTER, data, after, end, table)
    if found & NUMBER:
        return _number_end(data, i, end, table)
    byte = load8(data, i)
    follows = int64(SPACE)
    if after < end:
        follows, after_next = _class_at(data, after, table)
        if follows & LETTER and byte not in (_NEWLINE, _RETURN):
            return _run_of_letters(LETTER, data, after_next, end, table)
    if not found & SPACE or (byte == _BLANK and not follows & (NUMBER | SPACE)):
        return _others_end(data, after, end, table, False)
    return _space_end(data, i, end, table, True, True)


@helper
def _word_end(data, i, end, table):
    """Return the end of `upper* lower+` at i, or i where there is none."""
    lower_end = i
    while i < end:
        found, after = _class_at(data, i, table)
        if not found & UPPER:
            if found & LOWER:
                return _run_of_letters(LOWER, data, after, end, table)
            break
        i = after
        if found & LOWER:
            lower_end = i
    return lower_end


@helper
def _next_o200k(data, i, end, table):
    found, after = _class_at(data, i, table)
    if found & NUMBER:
        return _number_end(data, i, end, table)
    byte = load8(data, i)
    # Any one character may stand before a word, but for a letter, a number and a line end.
    begin = i if found & LETTER or byte in (_NEWLINE, _RETURN) else after
    word_end = _word_end(data, begin, end, table)
    # A mark before capitals is a word by itself: the pattern gives up the first character before it gives up lower case.
    if word_end == begin and not found & LOWER:
        word_end = _run_of(UPPER, data, begin, end, table)
    if word_end > begin or found & LOWER:
        return _contraction_end(data, word_end, end, True)
    follows = int64(SPACE)
    if after < end:
        follows, _ = _class_at(data, after, table)
    if not found & SPACE or (byte == _BLANK and not follows & (NUMBER | SPACE)):
        return _others_end(data, after, end, table, True)
    return _space_end(data, i, end, table, True, False)


@helper
def _borders_gpt2(data, i, remaining, table):
    """Return a mask of borders between pretokens in the 64 bytes from the border i on, or 0 if none can be told.

    The text goes on for `remaining` bytes; its end is a border too. There may be more borders above the highest bit set.
    """
    letter, digit, space, blank, apostrophe, foreign = class_masks(data, i)
    # A border at q depends on the bytes q - 1, q and q + 1, and a contraction at q moves one to q + 3.
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
        found, after = _class_at(data, i + q, table)
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
    # The last of a run of white space stands apart, and a blank there joins what follows.
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
        after = _contraction_end(data, i + q, i + remaining, False) - i
        if after > q:
            borders &= ~(uint64(2) << uint64(q))
            borders |= _ONE << uint64(after)
    return borders & known & ~_ONE


@helper
def _special_from(specials, i):
    """Return the index, in the flat array of starts and ends, of the first special token at or after i."""
    k = 0
    while k < len(specials) and specials[k] < i:
        k += 2
    return k


@helper
def _segment_end(specials, k, end):
    """Return where the text ends that reaches to special token k."""
    return min(specials[k], end) if k < len(specials) else end


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS)
def _scan_gpt2(data, start, end, ends, table, specials):
    i, n, k = start, 0, _special_from(specials, start)
    while i < end and n < len(ends):
        stop = _segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            n += 1
            k += 2
            continue
        borders = uint64(0)
        if i + 64 <= len(data) and n + 64 <= len(ends):
            borders = _borders_gpt2(data, i, stop - i, table)
        if borders == 0:
            i = _next_gpt2(data, i, stop, table)
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


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS)
def _scan_cl100k(data, start, end, ends, table, specials):
    i, n, k = start, 0, _special_from(specials, start)
    while i < end and n < len(ends):
        stop = _segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            k += 2
        else:
            i = _next_cl100k(data, i, stop, table)
            ends[n] = i
        n += 1
    return n


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS)
def _scan_o200k(data, start, end, ends, table, specials):
    i, n, k = start, 0, _special_from(specials, start)
    while i < end and n < len(ends):
        stop = _segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            k += 2
        else:
            i = _next_o200k(data, i, stop, table)
            ends[n] = i
        n += 1
    return n


_SCANNERS = {"gpt2": _scan_gpt2, "cl100k": _scan_cl100k, "o200k": _scan_o200k}
