"""Count distinct pretokens in an open-addressing hash table, and keep the counts in an order that nothing influences.

A slot is four words: the pretoken itself where it has at most 16 bytes, else 128 bits of hash; its length, and for a long one
where its bytes are kept; its count. The highest bits of a hash say where its slot is, so that the table, read from
beginning to end, is all but sorted by hash. That makes sorted counts cheap, and sorted counts are merged like sorted lists.

Pretokens can be made up that all have one hash. What finds no place near its slot is counted in a Python dictionary: slower,
but in linear time.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..compiled.intrinsics import copy_bytes, prefetch
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, UINT8S, UINT64S, check_array, compiled, helper, int64, uint64
from ..compiled.pretoken_keys import INLINE, compare_bytes, equal_bytes, order_of, pretoken_hash, pretoken_key


@dataclass(frozen=True, eq=False)
class PretokenCounts:
    """Distinct pretokens and how often each occurs.

    Pretoken i is `data[ends[i - 1]:ends[i]]` (from 0 for the first) and occurs `counts[i]` times. `data` is uint8, `ends` and
    `counts` are int64 of shape (n,). What this room counts is sorted by hash, so that equal counts have equal arrays.
    """

    data: np.ndarray
    ends: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        # Compiled code takes them for what they should be.
        for name, kind in (("data", np.uint8), ("ends", np.int64), ("counts", np.int64)):
            check_array(getattr(self, name), kind, name)
        if len(self.ends) != len(self.counts):
            raise ValueError(f"there are {len(self.ends)} ends and {len(self.counts)} counts: each pretoken has one of both")

    @property
    def is_sound(self) -> bool:
        """Whether the ends ascend from 0 to the end of `data`, and all counts are positive."""
        ends = self.ends
        last = int(ends[-1]) if len(ends) else 0
        return last == len(self.data) and bool(
            np.all(ends[:1] >= 0) and np.all(ends[1:] >= ends[:-1]) and np.all(self.counts > 0)
        )

    @classmethod
    def of(cls, counts: Mapping[bytes, int]) -> "PretokenCounts":
        """Return the counts of a mapping, in its order."""
        data = np.frombuffer(b"".join(counts), np.uint8)
        ends = np.cumsum(np.fromiter(map(len, counts), np.int64, len(counts)), dtype=np.int64)
        return cls(data, ends, np.fromiter(counts.values(), np.int64, len(counts)))

    def __len__(self) -> int:
        return len(self.ends)

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Yield (pretoken, count)."""
        data, start = self.data.tobytes(), 0
        for end, count in zip(self.ends.tolist(), self.counts.tolist(), strict=True):
            yield data[start:end], count
            start = end


class PretokenCounter:
    """Adds up pretokens; for one thread at a time, but other threads run meanwhile."""

    def __init__(self):
        self._table = np.zeros(_WORDS * _SMALLEST_TABLE, np.uint64)
        self._used = 0
        self._long = np.empty(_SMALLEST_LONG, np.uint8)
        self._long_used = 0
        self._keys = np.empty(3 * _GROUP, np.uint64)
        self._crowded: Counter[bytes] = Counter()
        self._crowded_bytes = 0

    @property
    def num_bytes(self) -> int:
        """The memory that the counter takes up."""
        return self._table.nbytes + self._long.nbytes + self._crowded_bytes

    @property
    def long_bytes(self) -> int:
        """The bytes of the pretokens that are too long for the table; less than 4 GiB."""
        return self._long_used

    def add(self, data: np.ndarray, start: int, ends: np.ndarray, counts: np.ndarray) -> None:
        """Count the pretokens of `data` that end at `ends`, the first from `start` on, each where the one before it ends.

        `data` is uint8, the others int64. A negative end skips to that place: there a special token ends. `counts` has one
        number for each pretoken, or one for all. A pretoken has less than 4 GiB.
        """
        check_array(data, np.uint8, "data")
        check_array(ends, np.int64, "ends")
        check_array(counts, np.int64, "counts")
        done = 0
        while True:
            done, self._used, self._long_used, crowded = _count(
                data, start, ends, counts, done, self._table, self._used, self._long, self._long_used, self._keys
            )
            if done == len(ends):
                return
            if crowded:
                begin = abs(int(ends[done - 1])) if done else start
                pretoken = data[begin : ends[done]].tobytes()
                if pretoken not in self._crowded:
                    self._crowded_bytes += len(pretoken) + _DICTIONARY_BYTES
                self._crowded[pretoken] += int(counts[done if len(counts) == len(ends) else 0])
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
        return merge_counts(found, sorted_by_hash(self._crowded)) if self._crowded else found


def sorted_by_hash(counts: Mapping[bytes, int]) -> PretokenCounts:
    """Return the counts in the order of what this room counts."""
    return PretokenCounts.of({each: counts[each] for each in sorted(counts, key=order_of)})


def merge_counts(first: PretokenCounts, second: PretokenCounts) -> PretokenCounts:
    """Return the sum of two counts that are both sorted by hash, sorted by hash."""
    merged = PretokenCounts(
        np.empty(len(first.data) + len(second.data), np.uint8),
        np.empty(len(first) + len(second), np.int64),
        np.empty(len(first) + len(second), np.int64),
    )
    _, _, size, used = merge_step(first, second, 0, 0, merged)
    return PretokenCounts(merged.data[:used], merged.ends[:size], merged.counts[:size])


def merge_step(
    first: PretokenCounts, second: PretokenCounts, i: int, j: int, merged: PretokenCounts
) -> tuple[int, int, int, int]:
    """Merge from index i of the first and j of the second on, until both end or `merged` is full.

    Returns the new i and j, and how many pretokens and how many bytes `merged` has now; its `ends` count from 0.
    """
    arrays = (first.data, first.ends, first.counts, second.data, second.ends, second.counts)
    i, j, size, used = _merge(*arrays, i, j, merged.data, merged.ends, merged.counts)
    return i, j, size, int(used)


_WORDS = 4
_SMALLEST_TABLE = 1 << 12
_SMALLEST_LONG = 1 << 16
# Places from its slot on where a pretoken may stand. In a table half full of pretokens that nobody made up, 100 suffice.
_PLACES = 256
# About what a dictionary and an object take for a pretoken.
_DICTIONARY_BYTES = 200
# Hashed and fetched ahead together, so that their cache misses overlap.
_GROUP = 32
_LENGTH = uint64(0xFFFFFFFF)


@helper
def _shift(table):
    """Return by how much a hash is shifted to become the number of a slot."""
    bits = 0
    while (_WORDS << bits) < len(table):
        bits += 1
    return uint64(64 - bits)


@compiled(BYTES, INT64, NUMBERS, NUMBERS, INT64, UINT64S, INT64, UINT8S, INT64, UINT64S)
def _count(data, start, ends, counts, done, table, used, long, long_used, keys):
    """Count from pretoken `done` on; return how far the table and the room for long ones sufficed, and what is used of both.

    Last is returned whether it ended at a pretoken that has no place near its slot.

    Indices are unsigned where it matters: a signed one is looked at each time, as it might be negative.
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
                told = table[k + uint64(2)]
                # One branch for all that has to agree, as it nearly always does.
                if (table[k] ^ low) | (table[k + uint64(1)] ^ high) | (told & _LENGTH ^ size) == uint64(0) and (
                    size <= INLINE or equal_bytes(data, start, long, int64(told >> uint64(32)), int64(size))
                ):
                    break
                if told == uint64(0):
                    told = size
                    if size > INLINE:
                        if long_used + int64(size) > len(long):
                            return int64(first + t), used, long_used, False
                        copy_bytes(long, long_used, data, start, int64(size))
                        told |= uint64(long_used) << uint64(32)
                        long_used += int64(size)
                    table[k], table[k + uint64(1)], table[k + uint64(2)] = low, high, told
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
    """Return the number of the first word of each entry, sorted; write where the entries would end one after another."""
    order, hashes, n = np.empty(len(ends), np.int64), np.empty(len(ends), np.uint64), 0
    shift = _shift(table)
    # Entries that did not fit at the end of the table stand at its beginning, and are the last of all.
    for wrapped in (False, True):
        for k in range(0, len(table), _WORDS):
            if table[k + 2] == 0:
                if wrapped:
                    break
                continue
            hashed = pretoken_hash(table[k], table[k + 1], table[k + 2] & _LENGTH)
            if (int64(hashed >> shift) * _WORDS > k) != wrapped:
                continue
            # Entries are out of order only near one another.
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
    """Return a number below or above 0, as entry k stands before or after entry m of the same hash."""
    size = int64(table[k + 2] & _LENGTH)
    order = _keys_differ(table[k], table[k + 1], size, table[m], table[m + 1], int64(table[m + 2] & _LENGTH))
    if order != 0:
        return order
    return compare_bytes(long, int64(table[k + 2] >> uint64(32)), long, int64(table[m + 2] >> uint64(32)), size)


@helper
def _keys_differ(low, high, size, other_low, other_high, other_size):
    """Order two pretokens of the same hash by size, then by the words that stand for them; 0 where those are equal."""
    if size != other_size:
        return size - other_size
    if low != other_low:
        return int64(-1) if low < other_low else int64(1)
    if high != other_high:
        return int64(-1) if high < other_high else int64(1)
    return int64(0)


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


@compiled(BYTES, NUMBERS, NUMBERS, BYTES, NUMBERS, NUMBERS, INT64, INT64, UINT8S, INT64S, INT64S)
def _merge(data, ends, counts, other_data, other_ends, other_counts, i, j, merged_data, merged_ends, merged_counts):
    n, used = 0, 0
    while n < len(merged_ends) and (i < len(ends) or j < len(other_ends)):
        order = int64(0)
        start, size, other_start, other_size = int64(0), int64(0), int64(0), int64(0)
        if i < len(ends):
            start = ends[i - 1] if i else int64(0)
            size = ends[i] - start
        else:
            order = int64(1)
        if j < len(other_ends):
            other_start = other_ends[j - 1] if j else int64(0)
            other_size = other_ends[j] - other_start
        else:
            order = int64(-1)
        if order == 0:
            low, high = pretoken_key(data, start, size)
            other_low, other_high = pretoken_key(other_data, other_start, other_size)
            hashed, other_hashed = pretoken_hash(low, high, size), pretoken_hash(other_low, other_high, other_size)
            if hashed != other_hashed:
                order = int64(-1) if hashed < other_hashed else int64(1)
            else:
                order = _keys_differ(low, high, size, other_low, other_high, other_size)
                if order == 0 and size > INLINE:
                    order = compare_bytes(data, start, other_data, other_start, size)
        if used + (size if order <= 0 else other_size) > len(merged_data):
            break
        if order <= 0:
            copy_bytes(merged_data, used, data, start, size)
            used += size
        else:
            copy_bytes(merged_data, used, other_data, other_start, other_size)
            used += other_size
        count = int64(0)
        if order <= 0:
            count += counts[i]
            i += 1
        if order >= 0:
            count += other_counts[j]
            j += 1
        merged_ends[n], merged_counts[n] = used, count
        n += 1
    return i, j, n, used
