"""Count distinct pretokens in an open-addressing hash table; the order of the counts is deterministic.

A slot has four words. The first two are the pretoken itself, up to 16 bytes, else 128 bits of hash. The third is the length
and, for a long pretoken, the place of its bytes. The fourth is the count. The highest bits of a hash select its slot, so the
table is almost sorted by hash, the order of `pretoken_counts.py`.

Adversarial pretokens may all have one hash. A pretoken without a free place near its slot is counted in a Python dictionary,
which is slower, but takes linear time.
"""

from collections import Counter

import numpy as np

from ..compiled.intrinsics import copy_bytes, prefetch
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, UINT8S, UINT64S, check_array, compiled, helper, int64, uint64
from ..compiled.pretoken_keys import INLINE, compare_bytes, equal_bytes, keys_differ, pretoken_hash, pretoken_key
from .pretoken_counts import PretokenCounts, merge_counts, sorted_by_hash


class PretokenCounter:
    """Counts pretokens. Use it from one thread at a time; it releases the GIL."""

    def __init__(self):
        self._table = np.zeros(_WORDS * _SMALLEST_TABLE, np.uint64)
        self._used = 0
        self._long = np.empty(_SMALLEST_LONG, np.uint8)
        self._long_used = 0
        self._keys = np.empty(3 * _GROUP, np.uint64)
        self._overflow: Counter[bytes] = Counter()
        self._overflow_bytes = 0

    @property
    def num_bytes(self) -> int:
        """The memory of the counter in bytes."""
        return self._table.nbytes + self._long.nbytes + self._overflow_bytes

    @property
    def long_bytes(self) -> int:
        """The bytes of the pretokens that are too long for the table; less than 4 GiB."""
        return self._long_used

    def add(self, data: np.ndarray, start: int, ends: np.ndarray, counts: np.ndarray) -> None:
        """Count the pretokens of `data` that end at `ends`; the first starts at `start`, each other at the previous end.

        `data` is uint8, the others int64. A negative end skips to that place, the end of a special token. `counts` has one
        number per pretoken, or one for all. A pretoken has less than 4 GiB.
        """
        check_array(data, np.uint8, "data")
        check_array(ends, np.int64, "ends")
        check_array(counts, np.int64, "counts")
        done = 0
        while True:
            done, self._used, self._long_used, overflows = _count(
                data, start, ends, counts, done, self._table, self._used, self._long, self._long_used, self._keys
            )
            if done == len(ends):
                return
            if overflows:
                begin = abs(int(ends[done - 1])) if done else start
                pretoken = data[begin : ends[done]].tobytes()
                if pretoken not in self._overflow:
                    self._overflow_bytes += len(pretoken) + _DICTIONARY_BYTES
                self._overflow[pretoken] += int(counts[done if len(counts) == len(ends) else 0])
                done += 1
            elif 2 * _WORDS * (self._used + _GROUP) > len(self._table):
                self._table = _grow(self._table)
            else:
                size = abs(int(ends[done])) - (abs(int(ends[done - 1])) if done else start)
                self._long = np.concatenate((self._long, np.empty(len(self._long) + size, np.uint8)))

    def counts(self) -> PretokenCounts:
        """Return all counts, sorted by hash."""
        ends, counts = np.empty(self._used, np.int64), np.empty(self._used, np.int64)
        order = _sorted_slots(self._table, self._long, ends, counts)
        data = np.empty(ends[-1] if self._used else 0, np.uint8)
        _copy(self._table, order, self._long, data)
        found = PretokenCounts(data, ends, counts)
        return merge_counts(found, sorted_by_hash(self._overflow)) if self._overflow else found


_WORDS = 4
_SMALLEST_TABLE = 1 << 12
_SMALLEST_LONG = 1 << 16
# Slots to probe for a pretoken. In a half-full table of ordinary pretokens, 100 suffice.
_PLACES = 256
# Approximate size of a dictionary entry and its objects.
_DICTIONARY_BYTES = 200
# Pretokens to hash and prefetch together, so that their cache misses overlap.
_GROUP = 32
_LENGTH = uint64(0xFFFFFFFF)


@helper
def _shift(table):
    """Return the shift that turns a hash into the number of a slot."""
    bits = 0
    while (_WORDS << bits) < len(table):
        bits += 1
    return uint64(64 - bits)


@compiled(BYTES, INT64, NUMBERS, NUMBERS, INT64, UINT64S, INT64, UINT8S, INT64, UINT64S)
def _count(data, start, ends, counts, done, table, used, long, long_used, keys):
    """Count from pretoken `done` on; return (done, used, long_used, overflows).

    Stops when the table or `long` is full. `overflows` marks that the next pretoken has no free place near its slot. Hot
    indices are unsigned: for a signed index, Numba emits a check for negative values.
    """
    shift, table_words = _shift(table), uint64(len(table))
    step = uint64(len(counts) == len(ends))
    if done > 0:
        start = abs(ends[done - 1])
    while done < len(ends):
        if 2 * _WORDS * (used + _GROUP) > len(table):
            break
        first, group = uint64(done), uint64(min(_GROUP, len(ends) - done))
        begin = start
        for t in range(group):
            end = ends[first + t]
            size = end - begin
            if size > 0:
                low, high = pretoken_key(data, begin, size)
                k = pretoken_hash(low, high, size) >> shift << uint64(2)
                prefetch(table, int64(k))
                at = uint64(3) * t
                keys[at], keys[at + uint64(1)], keys[at + uint64(2)] = low, high, k
            begin = abs(end)
        for t in range(group):
            end = ends[first + t]
            size = uint64(end - start)
            if end <= 0:
                start = -end
                continue
            at = uint64(3) * t
            low, high, k = keys[at], keys[at + uint64(1)], keys[at + uint64(2)]
            while True:
                size_word = table[k + uint64(2)]
                # A single branch for all comparisons, because it is nearly always taken.
                if (table[k] ^ low) | (table[k + uint64(1)] ^ high) | (size_word & _LENGTH ^ size) == uint64(0) and (
                    size <= INLINE or equal_bytes(data, start, long, int64(size_word >> uint64(32)), int64(size))
                ):
                    break
                if size_word == uint64(0):
                    size_word = size
                    if size > INLINE:
                        if long_used + int64(size) > len(long):
                            return int64(first + t), used, long_used, False
                        copy_bytes(long, long_used, data, start, int64(size))
                        size_word |= uint64(long_used) << uint64(32)
                        long_used += int64(size)
                    table[k], table[k + uint64(1)], table[k + uint64(2)] = low, high, size_word
                    used += 1
                    break
                k += uint64(_WORDS)
                if k == table_words:
                    k = uint64(0)
                if (k - keys[at + uint64(2)]) & (table_words - uint64(1)) == uint64(_WORDS * _PLACES):
                    return int64(first + t), used, long_used, True
            table[k + uint64(3)] += uint64(counts[step * (first + t)])
            start = end
        done += int64(group)
    return done, used, long_used, False


@compiled(UINT64S)
def _grow(table):
    """Return a table of twice the size with the same entries."""
    grown = np.zeros(2 * len(table), np.uint64)
    shift, last = _shift(grown), len(grown) // _WORDS - 1
    for k in range(0, len(table), _WORDS):
        if table[k + 2] != 0:
            slot = int64(pretoken_hash(table[k], table[k + 1], table[k + 2] & _LENGTH) >> shift)
            while grown[_WORDS * slot + 2] != 0:
                slot = slot + 1 if slot < last else 0
            for word in range(_WORDS):
                grown[_WORDS * slot + word] = table[k + word]
    return grown


@compiled(UINT64S, UINT8S, INT64S, INT64S)
def _sorted_slots(table, long, ends, counts):
    """Return the index of the first word of each entry, sorted; write the ends and counts of the sorted entries."""
    order, hashes, n = np.empty(len(ends), np.int64), np.empty(len(ends), np.uint64), 0
    shift = _shift(table)
    # Entries that wrapped around to the start of the table are the last ones.
    for wrapped in (False, True):
        for k in range(0, len(table), _WORDS):
            if table[k + 2] == 0:
                if wrapped:
                    break
                continue
            hashed = pretoken_hash(table[k], table[k + 1], table[k + 2] & _LENGTH)
            if (int64(hashed >> shift) * _WORDS > k) != wrapped:
                continue
            # Insertion sort: entries are out of order only locally.
            place = n
            while place > 0 and (
                hashes[place - 1] > hashed
                or (hashes[place - 1] == hashed and _entries_differ(table, long, order[place - 1], k) > 0)
            ):
                hashes[place], order[place] = hashes[place - 1], order[place - 1]
                place -= 1
            hashes[place], order[place] = hashed, k
            n += 1
    end = 0
    for place in range(n):
        end += int64(table[order[place] + 2] & _LENGTH)
        ends[place], counts[place] = end, int64(table[order[place] + 3])
    return order


@helper
def _entries_differ(table, long, k, m):
    """Compare entries k and m of equal hash; return a number below, at or above 0."""
    size = int64(table[k + 2] & _LENGTH)
    order = keys_differ(table[k], table[k + 1], size, table[m], table[m + 1], int64(table[m + 2] & _LENGTH))
    if order != 0:
        return order
    return compare_bytes(long, int64(table[k + 2] >> uint64(32)), long, int64(table[m + 2] >> uint64(32)), size)


@compiled(UINT64S, INT64S, UINT8S, UINT8S)
def _copy(table, order, long, data):
    """Write the bytes of the entries to `data`, one after another."""
    used = 0
    for k in order:
        size = int64(table[k + 2] & _LENGTH)
        if size > INLINE:
            copy_bytes(data, used, long, int64(table[k + 2] >> uint64(32)), size)
        else:
            for q in range(size):
                word = table[k] if q < 8 else table[k + 1]
                data[used + q] = np.uint8(word >> uint64(8 * (q & 7)))
        used += size
