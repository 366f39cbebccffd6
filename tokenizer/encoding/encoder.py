"""Encode text, as bytes, to arrays of ids: by compiled loops, or slowly where the order of merges is none of training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from ...errors import UserError
from ..reference import merge_pretoken
from ..text.patterns import pattern_name, split_text
from ..text.scanner import Scanner, scanner_of
from .backtracking import MergeTable, merge_table, new_scratch
from .decoder import TokenTable
from .pretoken_cache import NO_ID, new_memory, next_memory, write_ids

# Pretokens between two calls into compiled code, and the bytes that as many have where they are not long.
_BLOCK = 1 << 14
_ROOM = 1 << 17
# After a text longer than this, room for long pretokens is given back.
_KEPT = 1 << 24
# What `PlainEncoder` remembers: so many pretokens of at most so many bytes.
_REMEMBERED, _SHORT = 1 << 16, 32

_NO_CUTS = np.empty(0, np.int64)

# The ends of pretokens, in arrays, given the text, its borders, and an array to write to.
Splitter = Callable[[np.ndarray, np.ndarray, np.ndarray], Iterator[np.ndarray]]


class Encoder(Protocol):
    """Turns text into ids; any number of threads may do so at the same time."""

    def encode(
        self, data: np.ndarray, borders: np.ndarray, border_ids: np.ndarray, dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, and how many stand before each border.

        `data` is uint8 of shape (n,) and valid UTF-8 outside of the borders, which are [start, end, start, end, ...]: int64.
        Nothing merges across them; each becomes its id in `border_ids`, uint32, or nothing for `NO_ID`.
        """
        ...


def new_encoder(merges: Sequence[tuple[bytes, bytes]], ids: Mapping[bytes, int], tokens: TokenTable, pattern: str) -> Encoder:
    """Return the encoder of these merges; one that does not fit the ids, or is there twice, raises a `UserError`."""
    byte_ids = np.array([ids[bytes([byte])] for byte in range(256)], np.int64)
    return encoder_of(merge_ids(merges, ids), byte_ids, tokens, pattern)


def encoder_of(merges: np.ndarray, byte_ids: np.ndarray, tokens: TokenTable, pattern: str) -> Encoder:
    """Return the encoder of merges as `merge_ids` returns them; `byte_ids`, int64, are the ids of the bytes."""
    table = merge_table(merges, byte_ids, tokens)
    name = pattern_name(pattern)
    split = partial(_split_by_scanner, scanner_of(name)) if name else partial(split_by_regex, pattern)
    return PlainEncoder(merges, byte_ids, split) if table is None else CompiledEncoder(table, split)


def merge_ids(merges: Sequence[tuple[bytes, bytes]], ids: Mapping[bytes, int]) -> np.ndarray:
    """Return the ids of left, right and merged token of each merge: int64 of shape (n, 3).

    A merge that does not fit the ids, or is there twice, raises a `UserError`.
    """
    known: dict[tuple[bytes, bytes], int] = {}
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in ids:
                raise UserError(f"merge {rank}, {left!r} {right!r}, needs {token!r}, which is not in the vocabulary")
        if (first := known.setdefault((left, right), rank)) != rank:
            raise UserError(f"merge {rank}, {left!r} {right!r}, is merge {first} already: every merge needs one place")
    rows = [(ids[left], ids[right], ids[left + right]) for left, right in merges]
    return np.array(rows, np.int64).reshape(-1, 3)


class CompiledEncoder:
    """The encoder of merges whose parts are made by earlier ones."""

    def __init__(self, table: MergeTable, split: Splitter):
        self._table = table
        self._split = split
        self._desks = [_Desk(table)]

    def encode(
        self, data: np.ndarray, borders: np.ndarray, border_ids: np.ndarray, dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        cuts = np.zeros(len(border_ids), np.int64) if len(border_ids) else _NO_CUTS
        pieces = []
        total = start = border = 0
        # Taking from a list and adding to one cannot be interrupted by another thread.
        try:
            desk = self._desks.pop()
        except IndexError:
            desk = _Desk(self._table)
        for ends in self._split(data, borders, desk.ends):
            if len(data) - start > _ROOM:
                desk.make_room(abs(int(ends[-1])) - start)
            count = len(ends)
            first = size = 0
            seen = border
            while True:
                first, start, border, size = write_ids(
                    *desk.arrays, data, start, ends, first, count, border_ids, cuts, border, desk.out, size
                )
                if first == count:
                    break
                desk.next_memory()
            pieces.append(desk.out[:size].astype(dtype))
            if total:
                cuts[seen:border] += total
            total += size
        if len(data) > _KEPT:
            desk.make_room(0)
        # One that an error or Ctrl-C left in the midst of something does not come back.
        self._desks.append(desk)
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype), *pieces]), cuts


class _Desk:
    """What one thread works with."""

    def __init__(self, table: MergeTable) -> None:
        self._table = tuple(table)
        self.memory = new_memory()
        self.ends = np.empty(_BLOCK, np.int64)
        self._room = -1
        self.make_room(_ROOM)

    def make_room(self, num_bytes: int) -> None:
        """Have room for the ids of so many bytes, and not much more than that or the usual."""
        num_bytes = max(num_bytes, _ROOM)
        if num_bytes != self._room:
            self.out = np.empty(num_bytes + 2, np.uint32)
            self._scratch = new_scratch(num_bytes)
            self._lay_out()
            self._room = num_bytes

    def next_memory(self) -> None:
        """Have room for more pretokens."""
        self.memory = next_memory(self.memory)
        self._lay_out()

    def _lay_out(self) -> None:
        # Made once, because a short text takes little longer than to make it.
        self.arrays = self._table, tuple(self._scratch), tuple(self.memory)


class PlainEncoder:
    """The encoder of merges in any order whatever: `reference.py` says what that means."""

    def __init__(self, merges: np.ndarray, byte_ids: np.ndarray, split: Splitter):
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges.tolist())}
        self._products = merges[:, 2].tolist()
        self._byte_ids = byte_ids.tolist()
        self._split = split
        self._remembered = lru_cache(_REMEMBERED)(self._merge)

    def encode(
        self, data: np.ndarray, borders: np.ndarray, border_ids: np.ndarray, dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        ids: list[int] = []
        cuts: list[int] = []
        start = 0
        text = data.tobytes()
        for ends in self._split(data, borders, np.empty(_BLOCK, np.int64)):
            for end in ends.tolist():
                if end > 0:
                    pretoken = text[start:end]
                    ids += self._remembered(pretoken) if len(pretoken) <= _SHORT else self._merge(pretoken)
                else:
                    id = int(border_ids[len(cuts)])
                    cuts.append(len(ids))
                    ids += [id] * (id != NO_ID)
                start = abs(end)
        return np.array(ids, dtype), np.array(cuts, np.int64)

    def _merge(self, pretoken: bytes) -> list[int]:
        return merge_pretoken([self._byte_ids[byte] for byte in pretoken], self._ranks, self._products)


def _split_by_scanner(scan: Scanner, data: np.ndarray, borders: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    start, passed, end = 0, 0, len(data)
    while start < end:
        # The scanner looks for its place among the borders from the first one on.
        size = scan(data, start, end, ends, borders[passed:] if passed else borders)
        found = ends[:size]
        yield found
        if size < len(ends):
            return
        start = abs(int(found[-1]))
        if len(borders):
            passed += 2 * int(np.count_nonzero(found <= 0))


def split_by_regex(pattern: str, data: np.ndarray, borders: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the ends of pretokens as `Splitter` says; `pattern` is a regular expression."""
    start = 0
    for border_start, border_end in [*borders.reshape(-1, 2).tolist(), (len(data), None)]:
        text = data[start:border_start].tobytes().decode()
        pretokens = split_text(text, pattern)
        sizes = map(len, pretokens if text.isascii() else map(str.encode, pretokens))
        found = start + np.cumsum(np.fromiter(sizes, np.int64, len(pretokens)))
        yield from (found[k : k + len(ends)] for k in range(0, len(found), len(ends)))
        if border_end is not None:
            yield np.array([-border_end])
            start = border_end
