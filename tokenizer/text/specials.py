"""Find special tokens in bytes: the leftmost first, and the longest of several that begin at one place."""

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ..compiled.intrinsics import equal_mask, load8, trailing_zeros
from ..compiled.jit import BYTES, INT64S, NUMBERS, compiled, helper

NO_SPECIALS = np.empty(0, np.int64)


class SpecialFinder:
    """Finds the given special tokens in texts."""

    def __init__(self, special_tokens: Sequence[str]):
        longest_first = self._longest_first = sorted((token.encode() for token in special_tokens), key=len, reverse=True)
        self._tokens = np.frombuffer(b"".join(longest_first), np.uint8)
        self._ends = np.cumsum([len(token) for token in longest_first], dtype=np.int64)
        # Any byte may follow a token of one byte; 256 marks that, because it equals no byte.
        beginnings = {(token[0], token[1] if len(token) > 1 else _ANY) for token in longest_first}
        self.beginnings = np.array(sorted(beginnings), np.int64).reshape(-1)

    def find(self, data: np.ndarray) -> np.ndarray:
        """Return [start, end, start, end, ...], int64, of the special tokens in the uint8 text. Releases the GIL."""
        if not len(self._ends):
            return NO_SPECIALS
        if not _find.is_ready:
            places = [place for match in self._expression.finditer(data.tobytes()) for place in match.span()]
            return np.array(places, np.int64)
        # Space for a document every 512 bytes, so that one pass is enough for most texts.
        places = np.empty((len(data) >> 8) + 32, np.int64)
        while (size := _find(data, self._tokens, self._ends, self.beginnings, places)) > len(places):
            places = np.empty(size, np.int64)
        return places[:size]

    @cached_property
    def _expression(self) -> re.Pattern[bytes]:
        # An alternation takes the first branch that matches.
        return re.compile(b"|".join(map(re.escape, self._longest_first)))


_ANY = 256


@helper
def _candidates(data, i, beginnings):
    """Return a mask of the places, among the 64 from i, that hold the first two bytes of a token."""
    found = np.uint64(0)
    for k in range(0, len(beginnings), 2):
        mask = equal_mask(data, i, beginnings[k])
        if mask and beginnings[k + 1] != _ANY:
            mask &= equal_mask(data, i + 1, beginnings[k + 1])
        found |= mask
    return found


@helper
def may_hold_special(data, beginnings):
    """Return whether the text holds the first two bytes of a special token; see `SpecialFinder.beginnings`."""
    if len(beginnings) == 0:
        return False
    end = len(data) - 65
    for i in range(0, end, 64):
        if _candidates(data, i, beginnings):
            return True
    if end >= 0:
        return _candidates(data, end, beginnings) != 0
    for k in range(0, len(beginnings), 2):
        second = beginnings[k + 1]
        for i in range(len(data)):
            if load8(data, i) == beginnings[k] and (second == _ANY or (i + 1 < len(data) and load8(data, i + 1) == second)):
                return True
    return False


@compiled(BYTES, BYTES, NUMBERS, NUMBERS, INT64S)
def _find(data, tokens, token_ends, beginnings, places):
    """Write starts and ends to `places` as far as they fit; return how many there are."""
    size, i = 0, 0
    while i < len(data):
        # Most windows of 64 bytes contain no first two bytes of a token.
        if i + 65 <= len(data):
            candidates = _candidates(data, i, beginnings)
            if candidates == 0:
                i += 64
                continue
            i += trailing_zeros(candidates)
        found, start = 0, 0
        for end in token_ends:
            length = end - start
            if i + length <= len(data):
                k = 0
                while k < length and data[i + k] == tokens[start + k]:
                    k += 1
                if k == length:
                    found = length
                    break
            start = end
        if found:
            if size + 2 <= len(places):
                places[size], places[size + 1] = i, i + found
            size += 2
            i += found
        else:
            i += 1
    return size
