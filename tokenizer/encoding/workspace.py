"""What one thread encodes with: arrays, and the frame that tells compiled code where they are.

Numba takes about as long to receive five arrays as to encode a short text. So the arrays stand in one more, the frame, by
address and length, and only what differs from call to call is an argument.
"""

import numpy as np

from ..text.unicode_classes import class_table
from .backtracking import MergeTable, Scratch, new_scratch
from .encoder import BLOCK
from .pretoken_cache import LONGEST, PretokenCache
from .rank_merging import RankScratch, RankTable, rank_scratch

# Pretokens that are hashed and fetched ahead together at least, so that their cache misses overlap.
GROUP = 32
# Bytes that are looked at together where GPT-2's pretokens are found.
WINDOW = 64
# Compiled code may look this far past the end of a window of text: the end of a text is read from a copy with room behind it.
SLACK = 16
# Bytes of text whose ids are sure to fit in one piece: an array that stays in the processor's cache.
ROOM = 1 << 17

# Words of the frame that are numbers: where the encoding stands, and (`SCANS`) whether it finds the pretokens by itself.
START, BORDER, SIZE, TOTAL, GIVEN, COUNT, SCANS, NEEDED = range(8)
# Of the others, two each: address and length of an array.
_CACHE = ("entries", "texts", "cached_ids", "used")
_TABLE = tuple(f"table_{name}" for name in MergeTable._fields)
_RANKS = tuple(f"rank_{name}" for name in RankTable._fields)
_RANK_SCRATCH = tuple(f"rank_{name}" for name in RankScratch._fields)
_ARRAYS = (*_CACHE, *_TABLE, *_RANKS, *_RANK_SCRATCH, "failed", "neighbours", "classes", "keys", "ends", "given_ends", "tail")
_ARRAYS += ("borders", "border_ids", "cuts", "out", "short_out", "numbers", "beginnings")
PLACES = {name: np.int64(8 + 2 * index) for index, name in enumerate(_ARRAYS)}
FRAME_SIZE = 8 + 2 * len(_ARRAYS)

_NO_NUMBERS = np.empty(0, np.int64)
_NO_IDS = np.empty(0, np.uint32)


class EncoderWorkspace:
    """The arrays that one thread works with; `frame` (int64) names them to compiled code."""

    def __init__(
        self,
        tables: tuple[MergeTable, RankTable],
        cache: PretokenCache,
        numbers: np.ndarray,
        beginnings: np.ndarray,
        scans: bool,
    ):
        self.frame = np.zeros(FRAME_SIZE, np.int64)
        self.address = self.frame.ctypes.data
        self.frame[SCANS] = scans
        self._arrays: dict[str, np.ndarray] = {}
        for name, array in zip((*_TABLE, *_RANKS), (*tables[0], *tables[1]), strict=True):
            self.set(name, array)
        self._by_rank = len(tables[1].pairs) > 0
        self.set("classes", class_table())
        self.set("numbers", numbers)
        self._numbers = len(numbers)
        self.set("beginnings", beginnings)
        self.set_cache(cache)
        self.set("keys", np.zeros(3 * (GROUP + WINDOW), np.uint64))
        self.set("ends", np.empty(GROUP + 2 * WINDOW, np.int64))
        self.set("tail", np.zeros(2 * (WINDOW + SLACK), np.uint8))
        self.set_borders(_NO_NUMBERS, _NO_IDS, _NO_NUMBERS)
        self.given_ends = np.empty(0 if scans else BLOCK, np.int64)
        self.set("given_ends", self.given_ends)
        self.short_out = np.empty(ROOM + 2 * LONGEST, np.uint16)
        self.set("short_out", self.short_out)
        self.make_room(ROOM)

    def set(self, name: str, array: np.ndarray) -> None:
        """Let compiled code find a contiguous array under a name of `PLACES`."""
        place = int(PLACES[name])
        self.frame[place : place + 2] = array.ctypes.data, len(array)
        # So that it lives as long as its address is known.
        self._arrays[name] = array

    def set_cache(self, cache: PretokenCache) -> None:
        """Look pretokens up there from now on."""
        self.cache = cache
        for name, array in zip(_CACHE, cache, strict=True):
            self.set(name, array)

    def set_borders(self, borders: np.ndarray, border_ids: np.ndarray, cuts: np.ndarray) -> None:
        """Name the borders of the text, the id of each, and where its place among the ids is to be written."""
        self.set("borders", borders)
        self.set("border_ids", border_ids)
        self.set("cuts", cuts)

    def make_room(self, num_bytes: int) -> None:
        """Have room for the ids of so many bytes, and not much more than that."""
        self.out = np.empty(num_bytes + 2 * LONGEST, np.uint32)
        self.set("out", self.out)
        # What a short text is read from.
        self.results = self.short_out if self._numbers <= 1 << 16 else self.out
        # Of the two ways to merge, one is taken.
        scratch = new_scratch(0 if self._by_rank else len(self.out))
        rank = rank_scratch(len(self.out) if self._by_rank else 0)
        for name, array in zip((*Scratch._fields, *_RANK_SCRATCH), (*scratch, *rank), strict=True):
            self.set(name, array)

    def give(self, ends: np.ndarray) -> None:
        """Say where the next pretokens end, at most `BLOCK` of them; a negative end is that of a border."""
        self.given_ends[: len(ends)] = ends
        self.frame[GIVEN], self.frame[COUNT] = 0, len(ends)

    def clear_output(self) -> None:
        """Have room for what comes next, once the ids so far have been taken from `out`."""
        frame = self.frame
        frame[TOTAL] += frame[SIZE]
        frame[SIZE] = 0
        if frame[NEEDED] > len(self.out) - LONGEST:
            self.make_room(int(frame[NEEDED]))
