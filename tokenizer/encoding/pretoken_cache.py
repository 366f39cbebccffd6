"""The cache of the encoder: a hash table from pretokens to their ids, shared by all threads.

An entry has four words. The first two are the key: the bytes of a pretoken of at most `INLINE` bytes, else a hash of them.
The third is the size and, from bit 32 on, the place of a longer pretoken's bytes in `texts`. The fourth holds the ids, or 0
for an empty entry: either up to three ids below 2^20 with their number in the lowest two bits, or the place in `ids` of the
number and the ids, shifted left by two bits.

Reads are lock-free: the word of the ids is written last and read first. One thread at a time adds an entry. A thread that
finds the lock taken skips the insertion; the pretoken is merged again next time.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..compiled.intrinsics import copy_bytes, load_acquire, store_release, try_lock
from ..compiled.jit import BYTES, INT64S, UINT8S, UINT32S, UINT64S, compiled, helper, int64, uint64
from ..compiled.pretoken_keys import INLINE, equal_bytes, pretoken_hash, pretoken_key

# Longer pretokens are rare and not cached.
LONGEST = 128
# Maximum number of probes. Only adversarial text needs more, and would take quadratic time.
LOOKUPS = 256
_SMALLEST, _USUAL, _LARGEST = 1 << 12, 1 << 16, 1 << 21
_LONG_TEXT = 1 << 20

_WORDS = uint64(4)
_ID_BITS, _ID = uint64(20), uint64((1 << 20) - 1)
_LOW_WORD = uint64(0xFFFFFFFF)
# Words of `used`.
_ENTRIES, _TEXTS, _IDS, LOCK = map(np.uint64, range(4))


class PretokenCache(NamedTuple):
    """The arrays of a cache. `used` counts entries, bytes of `texts` and members of `ids`; its last word is the lock."""

    entries: np.ndarray
    texts: np.ndarray
    ids: np.ndarray
    used: np.ndarray


def new_cache(entries: int = _SMALLEST) -> PretokenCache:
    """Return an empty cache with 64 bytes per entry; `entries` is a power of two."""
    used = np.zeros(4, np.uint64)
    # The word of the ids is 0 for an empty entry, so place 0 is reserved.
    used[_IDS] = 1
    return PretokenCache(
        entries=np.zeros(4 * entries, np.uint64),
        texts=np.zeros(16 * entries, np.uint8),
        ids=np.zeros(4 * entries, np.uint32),
        used=used,
    )


def next_cache(cache: PretokenCache, num_bytes: int) -> PretokenCache:
    """Return the successor of a full cache, while a text of `num_bytes` is encoded.

    Grow a full cache four times and keep its entries; at 128 MB start an empty one. For a long text, start an empty one of
    the usual size at once.
    """
    entries = len(cache.entries) // 4
    if entries >= _LARGEST:
        return new_cache(entries)
    if entries < _USUAL and num_bytes >= _LONG_TEXT:
        # Loading the copying code takes longer than merging so few pretokens again.
        return new_cache(_USUAL)
    larger = new_cache(min(4 * entries, _LARGEST))
    _copy_cache(*cache, *larger)
    return larger


class WholeTokens(NamedTuple):
    """Tokens that are in the cache from the start, because no merges produce them: their bytes, ends and ids."""

    data: np.ndarray
    ends: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, tokens: Mapping[bytes, int]) -> "WholeTokens | None":
        """Return the given tokens, or None if they are too many or too long for a cache."""
        if len(tokens) > _LARGEST // 16 or max(map(len, tokens), default=0) > LONGEST:
            return None
        if sum(map(len, tokens)) > 4 * _LARGEST:
            return None
        data = np.frombuffer(b"".join(tokens) + bytes(INLINE), np.uint8)
        ends = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)), dtype=np.int64)
        return cls(data, ends, np.fromiter(tokens.values(), np.uint32, len(tokens)))

    def add_to(self, cache: PretokenCache) -> PretokenCache | None:
        """Add the tokens to the cache, or to a larger new one, and return it.

        Returns None for tokens chosen to collide: no cache of reasonable size can hold them.
        """
        if not len(self.ends):
            return cache
        while _add_tokens(*cache, *self) < len(self.ends):
            if len(cache.entries) // 4 > 64 * max(_SMALLEST, len(self.ends)):
                return None
            cache = new_cache(len(cache.entries))
        return cache


@compiled(UINT64S, UINT8S, UINT32S, UINT64S, BYTES, INT64S, UINT32S)
def _add_tokens(entries, texts, cached, used, data, ends, ids):
    """Add tokens until the cache is full; return how many were added."""
    start = 0
    for k in range(len(ends)):
        size = ends[k] - start
        low, high = pretoken_key(data, start, size)
        entry = first_entry(entries, low, high, uint64(size))
        entry, _ = find_entry(entries, texts, entry, low, high, data, start, size)
        if entry == uint64(len(entries)) or not has_room(entries, texts, cached, used, size):
            return k
        add_entry(entries, texts, cached, used, entry, low, high, data, start, size, ids, uint64(k), 1)
        start = ends[k]
    return len(ends)


@helper
def first_entry(entries, low, high, size):
    """Return the index of the first word of the first entry to probe for a pretoken."""
    return _WORDS * (pretoken_hash(low, high, size) & uint64(len(entries) // 4 - 1))


@helper
def find_entry(entries, texts, entry, low, high, data, start, size):
    """Return the entry of the pretoken and its word of ids, or the empty entry to store it in and 0.

    The entry is past the end of `entries` if neither is found within `LOOKUPS` probes.
    """
    for _ in range(LOOKUPS):
        value = load_acquire(entries, entry + uint64(3))
        if value == uint64(0):
            return entry, value
        size_word = entries[entry + uint64(2)]
        # A single branch for all comparisons, because it is nearly always taken.
        differs = (entries[entry] ^ low) | (entries[entry + uint64(1)] ^ high) | (size_word & _LOW_WORD ^ uint64(size))
        if differs == uint64(0) and (size <= INLINE or equal_bytes(data, start, texts, int64(size_word >> uint64(32)), size)):
            return entry, value
        entry = (entry + _WORDS) & uint64(len(entries) - 1)
    return uint64(len(entries)), uint64(0)


@helper
def write_packed(value, out, place):
    """Write the up to three ids of an entry's last word, and padding after them; return the end of the ids."""
    out[place] = value >> uint64(2) & _ID
    out[place + uint64(1)] = value >> uint64(2) + _ID_BITS & _ID
    out[place + uint64(2)] = value >> uint64(2) + _ID_BITS + _ID_BITS
    return place + (value & uint64(3))


@helper
def write_cached(value, ids, out, place):
    """Write the ids of an entry, given its last word; return their end."""
    if value & uint64(3):
        return write_packed(value, out, place)
    begin = value >> uint64(2)
    number = uint64(ids[begin])
    for index in range(number):
        out[place + index] = ids[begin + uint64(1) + index]
    return place + number


@helper
def has_room(entries, texts, ids, used, size):
    """Return whether a pretoken of `size` bytes can be added."""
    return (
        uint64(8) * used[_ENTRIES] < uint64(len(entries))
        and used[_TEXTS] + uint64(size) <= uint64(len(texts))
        and used[_IDS] + uint64(size) < uint64(len(ids))
    )


@helper
def add_entry(entries, texts, ids, used, entry, low, high, data, start, size, out, place, number):
    """Add a pretoken with `number` ids from `out` to an empty entry, unless another thread is adding one."""
    if not try_lock(used, LOCK):
        return
    # Another thread may have filled the entry or the cache since the probe.
    if entries[entry + uint64(3)] == uint64(0) and has_room(entries, texts, ids, used, size):
        value, largest = uint64(number), uint64(0)
        for index in range(min(number, 3)):
            value |= uint64(out[place + index]) << uint64(2 + 20 * index)
            largest = max(largest, uint64(out[place + index]))
        if number > 3 or largest > _ID:
            begin = used[_IDS]
            value = begin << uint64(2)
            ids[begin] = number
            for index in range(uint64(number)):
                ids[begin + uint64(1) + index] = out[uint64(place) + index]
            used[_IDS] += uint64(1 + number)
        size_word = uint64(size)
        if size > INLINE:
            size_word |= used[_TEXTS] << uint64(32)
            copy_bytes(texts, int64(used[_TEXTS]), data, start, size)
            used[_TEXTS] += uint64(size)
        entries[entry], entries[entry + uint64(1)], entries[entry + uint64(2)] = low, high, size_word
        store_release(entries, entry + uint64(3), value)
        used[_ENTRIES] += uint64(1)
    store_release(used, LOCK, uint64(0))


@compiled(UINT64S, UINT8S, UINT32S, UINT64S, UINT64S, UINT8S, UINT32S, UINT64S)
def _copy_cache(entries, texts, ids, used, larger, larger_texts, larger_ids, larger_used):
    # Hold the lock, so that the copy is consistent.
    while not try_lock(used, LOCK):
        pass
    for k in range(int64(used[_TEXTS])):
        larger_texts[k] = texts[k]
    for k in range(int64(used[_IDS])):
        larger_ids[k] = ids[k]
    for k in range(3):
        larger_used[k] = used[k]
    for k in range(0, len(entries), 4):
        if entries[k + 3]:
            place = first_entry(larger, entries[k], entries[k + 1], entries[k + 2] & _LOW_WORD)
            while larger[place + uint64(3)]:
                place = (place + _WORDS) & uint64(len(larger) - 1)
            for word in range(4):
                larger[place + uint64(word)] = entries[k + word]
    store_release(used, LOCK, uint64(0))
