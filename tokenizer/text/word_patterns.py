"""The compiled scanners of cl100k and its derivatives Llama 3 and Qwen 2, and of o200k and its derivative Tekken."""

from ..compiled.intrinsics import load8
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, compiled, helper, int64
from .characters import (
    BLANK,
    NEWLINE,
    RETURN,
    class_at,
    contraction_end,
    number_end,
    others_end,
    run_of,
    run_of_letters,
    segment_end,
    space_end,
    special_from,
)
from .unicode_classes import LETTER, LOWER, NUMBER, SPACE, UPPER


@helper
def _next_letters(data, i, end, table, most_digits, all_space):
    after = contraction_end(data, i, end, True)
    if after > i:
        return after
    found, after = class_at(data, i, table)
    if found & LETTER:
        return run_of_letters(LETTER, data, after, end, table)
    if found & NUMBER:
        return number_end(data, i, end, table, most_digits)
    byte = load8(data, i)
    follows = int64(SPACE)
    if after < end:
        follows, after_next = class_at(data, after, table)
        if follows & LETTER and byte not in (NEWLINE, RETURN):
            return run_of_letters(LETTER, data, after_next, end, table)
    if not found & SPACE or (byte == BLANK and not follows & (NUMBER | SPACE)):
        return others_end(data, after, end, table, False)
    return space_end(data, i, end, table, True, all_space)


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS, INT64, INT64)
def scan_letter_words(data, start, end, ends, table, specials, most_digits, all_space):
    """Implement `Scanner` for words that consist of letters, after any one character."""
    i, n, k = start, 0, special_from(specials, start)
    while i < end and n < len(ends):
        stop = segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            k += 2
        else:
            i = _next_letters(data, i, stop, table, most_digits, all_space)
            ends[n] = i
        n += 1
    return n


@helper
def _word_end(data, i, end, table):
    """Return the end of `upper* lower+` at i, or i if there is none."""
    lower_end = i
    while i < end:
        found, after = class_at(data, i, table)
        if not found & UPPER:
            if found & LOWER:
                return run_of_letters(LOWER, data, after, end, table)
            break
        i = after
        if found & LOWER:
            lower_end = i
    return lower_end


@helper
def _next_by_case(data, i, end, table, most_digits, contractions):
    found, after = class_at(data, i, table)
    if found & NUMBER:
        return number_end(data, i, end, table, most_digits)
    byte = load8(data, i)
    # Any one character may precede a word, except a letter, a number and a line end.
    begin = i if found & LETTER or byte in (NEWLINE, RETURN) else after
    word_end = _word_end(data, begin, end, table)
    # A mark before capitals is a separate word: the pattern backtracks over the optional first character before it backtracks
    # over lower case.
    if word_end == begin and not found & LOWER:
        word_end = run_of(UPPER, data, begin, end, table)
    if word_end > begin or found & LOWER:
        return contraction_end(data, word_end, end, True) if contractions else word_end
    follows = int64(SPACE)
    if after < end:
        follows, _ = class_at(data, after, table)
    if not found & SPACE or (byte == BLANK and not follows & (NUMBER | SPACE)):
        return others_end(data, after, end, table, True)
    return space_end(data, i, end, table, True, False)


@compiled(BYTES, INT64, INT64, INT64S, BYTES, NUMBERS, INT64, INT64)
def scan_words_by_case(data, start, end, ends, table, specials, most_digits, contractions):
    """Implement `Scanner` for words that consist of capitals and then lower case, with marks in both."""
    i, n, k = start, 0, special_from(specials, start)
    while i < end and n < len(ends):
        stop = segment_end(specials, k, end)
        if i == stop:
            i = specials[k + 1]
            ends[n] = -i
            k += 2
        else:
            i = _next_by_case(data, i, stop, table, most_digits, contractions)
            ends[n] = i
        n += 1
    return n
