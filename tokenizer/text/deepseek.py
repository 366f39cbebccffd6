"""The compiled scanner of DeepSeek V3's pattern, which separates numbers, Han and kana from other text.

Each of the three parts (numbers, Han and kana, and the rest) is split as if it were the whole text.
"""

from ..compiled.intrinsics import load8, range_mask, trailing_zeros
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, compiled, helper, int64
from .characters import (
    BLANK,
    LOWER_A,
    LOWER_Z,
    NEWLINE,
    RETURN,
    UPPER_A,
    UPPER_Z,
    class_at,
    number_end,
    segment_end,
    special_from,
)
from .unicode_classes import HAN_KANA, LETTER, NUMBER, SPACE, SYMBOL, UPPER

# Includes marks: they have the UPPER bit.
_WORD = LETTER | UPPER


@helper
def _continues(found, first):
    """Return whether a character of class `found` is in the same part of the text as one of class `first`."""
    return (found ^ first) & HAN_KANA == 0 and found & NUMBER == 0


@helper
def _word_end(data, i, end, table, first):
    """Return the end of the letters and marks that start at i."""
    while i < end:
        if i + 64 <= len(data) and not first & HAN_KANA:
            size = trailing_zeros(~(range_mask(data, i, LOWER_A, LOWER_Z) | range_mask(data, i, UPPER_A, UPPER_Z)))
            i += size
            if size == 64:
                continue
            if i >= end:
                break
        found, after = class_at(data, i, table)
        if not found & _WORD or not _continues(found, first):
            break
        i = after
    # Bytes after the end of the text may be letters too.
    return min(i, end)


@helper
def _is_ascii_letter(byte):
    return LOWER_A <= byte | 0x20 <= LOWER_Z


@helper
def _symbols_end(data, i, end, table, first):
    """Return the end of the punctuation and symbols that start at i, including line ends after them."""
    while i < end:
        found, after = class_at(data, i, table)
        if not found & SYMBOL or not _continues(found, first):
            break
        i = after
    # Line ends are not kana.
    while i < end and not first & HAN_KANA and load8(data, i) in (NEWLINE, RETURN):
        i += 1
    return i


@helper
def _space_end(data, i, end, table):
    """Return the end of the pretoken at i that consists of white space only."""
    last, line, p = i, i, i
    while p < end:
        byte = load8(data, p)
        found, after = class_at(data, p, table)
        if not found & SPACE:
            if not _continues(found, SPACE):
                last = i
            break
        if byte in (NEWLINE, RETURN):
            line = after
        last, p = p, after
    if line > i:
        return line
    return p if p == end or last == i else last


@helper
def _gap_end(data, i, end, table, first):
    """Return the end of the characters at i that nothing in the pattern matches, such as control codes."""
    while i < end:
        found, after = class_at(data, i, table)
        if found & ~HAN_KANA or not _continues(found, first):
            break
        if after < end:
            follows, _ = class_at(data, after, table)
            if follows & _WORD and _continues(follows, first):
                break
        i = after
    return i


@helper
def _next(data, i, end, table):
    first, after = class_at(data, i, table)
    if first & NUMBER:
        return number_end(data, i, end, table, 3)
    if first & LETTER:
        return _word_end(data, after, end, table, first)
    byte = load8(data, i)
    follows, after_next = int64(0), after
    if after < end:
        follows, after_next = class_at(data, after, table)
        if not _continues(follows, first):
            follows = int64(0)
    if first & SYMBOL:
        if byte < 0x80 and follows and _is_ascii_letter(load8(data, after)):
            i = after_next
            while i < end and _is_ascii_letter(load8(data, i)):
                i += 1
            return i
        return _symbols_end(data, after, end, table, first)
    if follows & _WORD and byte not in (NEWLINE, RETURN):
        return _word_end(data, after_next, end, table, first)
    if first & UPPER:  # a mark alone
        return after
    if byte == BLANK and follows & SYMBOL:
        return _symbols_end(data, after_next, end, table, first)
    if first & SPACE:
        return _space_end(data, i, end, table)
    return _gap_end(data, after, end, table, first)


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS)
def scan_deepseek(data, start, end, ends, table, specials):
    """Implement `Scanner`."""
    i, n, k = start, 0, special_from(specials, start)
    while i < end and n < len(ends):
        stop = segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            k += 2
        else:
            i = _next(data, i, stop, table)
            ends[n] = i
        n += 1
    return n
