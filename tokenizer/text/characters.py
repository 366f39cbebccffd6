"""Building blocks of the compiled scanners: classes of characters in UTF-8, runs, white space, contractions."""

from ..compiled.intrinsics import load8, range_mask, trailing_zeros
from ..compiled.jit import helper, int64
from .unicode_classes import LETTER, NUMBER, SPACE

APOSTROPHE, BLANK, NEWLINE, RETURN, SLASH = b"' \n\r/"
LOWER_A, LOWER_Z, UPPER_A, UPPER_Z = b"azAZ"


@helper
def class_at(data, i, table):
    """Return the class of the character at i and the start of the next character."""
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
def run_of(bits, data, i, end, table):
    """Return the end of the run of characters of the classes `bits` that starts at i."""
    while i < end:
        found, after = class_at(data, i, table)
        if found & bits == 0:
            break
        i = after
    return i


@helper
def run_of_letters(bits, data, i, end, table):
    """Do the same as `run_of` for LETTER or LOWER, with 64 ASCII letters per step."""
    while i < end:
        if i + 64 <= len(data):
            letters = range_mask(data, i, LOWER_A, LOWER_Z)
            if bits == LETTER:
                letters |= range_mask(data, i, UPPER_A, UPPER_Z)
            size = trailing_zeros(~letters)
            i += size
            if size == 64:
                continue
            if i >= end:
                break
        found, after = class_at(data, i, table)
        if found & bits == 0:
            break
        i = after
    # Bytes after the end of the text may be letters too.
    return min(i, end)


@helper
def run_of_others(data, i, end, table):
    """Return the end of the run at i of characters that are not letters, numbers or white space."""
    while i < end:
        found, after = class_at(data, i, table)
        if found & (LETTER | NUMBER | SPACE):
            break
        i = after
    return i


@helper
def space_end(data, i, end, table, lines, whole):
    r"""Return the end of the pretoken at i that consists of white space only.

    It matches `\s+(?!\S)|\s+`: the run without its last character, unless the text ends there or the run is a single
    character. With `lines`, the run up to its last line end matches first, unless the text ends after it and `whole` is set:
    then the whole run matches.
    """
    last, line, p = i, i, i
    while p < end:
        byte = load8(data, p)
        found, after = class_at(data, p, table)
        if not found & SPACE:
            break
        if byte in (NEWLINE, RETURN):
            line = after
        last, p = p, after
    if lines and line > i and not (whole and p == end):
        return line
    return p if p == end or last == i else last


@helper
def contraction_end(data, i, end, any_case):
    """Return the end of 's, 'd, 'm, 't, 'll, 've or 're at i, or i if there is none."""
    if i + 1 >= end or load8(data, i) != APOSTROPHE:
        return i
    first = load8(data, i + 1)
    second = load8(data, i + 2) if i + 2 < end else int64(0)
    if any_case:
        if first == 0xC5 and second == 0xBF:
            return i + 3  # the long s, which equals s if case is ignored
        first |= 0x20
        second |= 0x20
    if first == ord("s") or first == ord("d") or first == ord("m") or first == ord("t"):
        return i + 2
    if (first == ord("l") and second == ord("l")) or ((first == ord("v") or first == ord("r")) and second == ord("e")):
        return i + 3
    return i


@helper
def special_from(specials, i):
    """Return the index of the first special token at or after i, in the flat array of starts and ends."""
    k = 0
    while k < len(specials) and specials[k] < i:
        k += 2
    return k


@helper
def segment_end(specials, k, end):
    """Return the end of the text before special token k."""
    return min(specials[k], end) if k < len(specials) else end


@helper
def others_end(data, i, end, table, slash):
    """Return the end of the run at i of `run_of_others`, including line ends and slashes after it."""
    i = run_of_others(data, i, end, table)
    while i < end:
        byte = load8(data, i)
        if byte not in (NEWLINE, RETURN) and not (slash and byte == SLASH):
            break
        i += 1
    return i


@helper
def number_end(data, i, end, table, most):
    """Return the end of up to `most` number characters at i."""
    for _ in range(most):
        if i < end:
            found, after = class_at(data, i, table)
            if found & NUMBER:
                i = after
    return i
