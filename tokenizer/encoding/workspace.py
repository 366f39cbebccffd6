"""The arrays of one encoding thread, and the frame that passes their addresses to compiled code.

Numba takes about as long to unbox five arrays as to encode a short text. The frame therefore holds the addresses and lengths
of the arrays, and only values that differ from call to call are arguments.
"""

import numpy as np

from ..text.unicode_classes import class_table
from .backtracking import MergeTable, Scratch, new_scratch
from .encoder import BLOCK
from .pretoken_cache import LONGEST, PretokenCache
from .rank_merging import RankScratch, RankTable, rank_scratch

# Minimum number of pretokens to hash and prefetch together, so that their cache misses overlap.
GROUP = 32
# Bytes per step of the search for GPT-2's pretokens.
WINDOW = 64
# Compiled code may read this far past a window of text, so the end of a text is read from a padded copy.
SLACK = 16
# Bytes of text whose ids are certain to fit into the output buffers; buffers of this size stay in the processor's cache.
TEXT_BYTES = 1 << 17

# Words of the frame that hold numbers: the state of the encoding, and (`SCANS`) whether the loop finds the pretokens itself.
START, BORDER, SIZE, TOTAL, GIVEN, COUNT, SCANS, NEEDED = range(8)
# The other words, two per array: address and length.
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
    """The arrays of one thread; `frame` (int64) holds their addresses for compiled code."""

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
        self.short_out = np.empty(TEXT_BYTES + 2 * LONGEST, np.uint16)
        self.set("short_out", self.short_out)
        self.resize_output(TEXT_BYTES)

    def set(self, name: str, array: np.ndarray) -> None:
        """Store the address and length of a contiguous array under a name in `PLACES`."""
        place = int(PLACES[name])
        self.frame[place : place + 2] = array.ctypes.data, len(array)
        # Keep the array alive while the frame holds its address.
        self._arrays[name] = array

    def set_cache(self, cache: PretokenCache) -> None:
        """Use this cache from now on."""
        self.cache = cache
        for name, array in zip(_CACHE, cache, strict=True):
            self.set(name, array)

    def set_borders(self, borders: np.ndarray, border_ids: np.ndarray, cuts: np.ndarray) -> None:
        """Set the borders of the text, their ids, and the array for the number of ids before each border."""
        self.set("borders", borders)
        self.set("border_ids", border_ids)
        self.set("cuts", cuts)

    def resize_output(self, num_bytes: int) -> None:
        """Resize the buffers for a text of `num_bytes` bytes."""
        self.out = np.empty(num_bytes + 2 * LONGEST, np.uint32)
        self.set("out", self.out)
        # The results of a short text are read from this array.
        self.results = self.short_out if self._numbers <= 1 << 16 else self.out
        # Only one of the two merge algorithms is used.
        scratch = new_scratch(0 if self._by_rank else len(self.out))
        rank = rank_scratch(len(self.out) if self._by_rank else 0)
        for name, array in zip((*Scratch._fields, *_RANK_SCRATCH), (*scratch, *rank), strict=True):
            self.set(name, array)

    def give(self, ends: np.ndarray) -> None:
        """Set the ends of the next pretokens, at most `BLOCK`; the end of a border is negative."""
        self.given_ends[: len(ends)] = ends
        self.frame[GIVEN], self.frame[COUNT] = 0, len(ends)

    def clear_output(self) -> None:
        """Clear the output after its ids were read, and grow it if the next pretoken needs more space."""
        frame = self.frame
        frame[TOTAL] += frame[SIZE]
        frame[SIZE] = 0
        if frame[NEEDED] > len(self.out) - LONGEST:
            self.resize_output(int(frame[NEEDED]))
