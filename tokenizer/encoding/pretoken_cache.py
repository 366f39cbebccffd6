"""The compiled loop of the encoder: pretokens to ids, each distinct one merged once and from then on remembered."""

from typing import NamedTuple

import numpy as np

from ..compiled.intrinsics import copy_bytes, prefetch
from ..compiled.jit import BYTES, INT64, INT64S, UINT8S, UINT32S, UINT64S, compiled, helper, int64, tuple_of, uint64
from ..compiled.pretoken_keys import INLINE, equal_bytes, pretoken_hash, pretoken_key
from .backtracking import MERGE_TABLE, SCRATCH, merge_bytes

# Stands in place of an id for a border that is no token.
NO_ID = (1 << 32) - 1

# Longer pretokens are rare, and merged each time.
_LONGEST = 128
# Only text made for it has so many pretokens that share a place; looking on would take quadratic time.
_LOOKUPS = 256
# Pretokens that are hashed and fetched ahead together, so that their cache misses overlap.
_GROUP = 32
_SMALLEST, _LARGEST = 1 << 12, 1 << 20

_WORDS = uint64(4)
_ID_BITS, _ID = uint64(20), uint64((1 << 20) - 1)
_LOW_WORD = uint64(0xFFFFFFFF)


class Memory(NamedTuple):
    """A hash table from pretokens to their ids.

    An entry is four words: two that stand for the pretoken, and are its bytes where it has at most `INLINE`; its size, 0 for no
    entry, with the place of its bytes in `texts` from bit 32 on where it has more; its ids. Up to three ids below 2^20
    stand there themselves, above their number in the lowest two bits; else `ids` has them, behind their number, and the word
    is that place, shifted by two bits. `used` counts entries, bytes of `texts` and members of `ids`. `keys` is scratch.
    """

    entries: np.ndarray
    texts: np.ndarray
    ids: np.ndarray
    used: np.ndarray
    keys: np.ndarray


_MEMORY = tuple_of(Memory, UINT64S, UINT8S, UINT32S, INT64S, UINT64S)
# Calls from Python take twice as long with named ones.
_PLAIN_TUPLES = [kind.plain() for kind in (MERGE_TABLE, SCRATCH, _MEMORY)]


def new_memory(entries: int = _SMALLEST) -> Memory:
    """Return an empty memory of 64 bytes an entry, a power of two."""
    return Memory(
        entries=np.zeros(4 * entries, np.uint64),
        texts=np.zeros(16 * entries, np.uint8),
        ids=np.zeros(4 * entries, np.uint32),
        used=np.zeros(3, np.int64),
        keys=np.zeros(3 * _GROUP, np.uint64),
    )


def next_memory(memory: Memory) -> Memory:
    """Return what follows a memory that is full: one four times as large that knows the same, or, at 64 MB, an empty one."""
    entries = len(memory.entries) // 4
    if entries >= _LARGEST:
        return new_memory(entries)
    larger = new_memory(4 * entries)
    larger.texts[: len(memory.texts)] = memory.texts
    larger.ids[: len(memory.ids)] = memory.ids
    larger.used[:] = memory.used
    _copy_entries(memory.entries, larger.entries)
    return larger


@helper
def _place(entries, low, high, size):
    """Return the number of the entry to begin with."""
    return pretoken_hash(low, high, size) & uint64(len(entries) // 4 - 1)


@helper
def _next_place(entries, place):
    return (place + uint64(1)) & uint64(len(entries) // 4 - 1)


@compiled(UINT64S, UINT64S)
def _copy_entries(entries, larger):
    for k in range(0, len(entries), 4):
        size = entries[k + 2] & _LOW_WORD
        if size:
            place = _place(larger, entries[k], entries[k + 1], size)
            while larger[_WORDS * place + uint64(2)]:
                place = _next_place(larger, place)
            for word in range(4):
                larger[_WORDS * place + uint64(word)] = entries[k + word]


@helper
def _write_packed(value, out, place):
    """Write the up to three ids of an entry's last word, and something behind them; return where they end."""
    out[place] = value >> uint64(2) & _ID
    out[place + uint64(1)] = value >> uint64(2) + _ID_BITS & _ID
    out[place + uint64(2)] = value >> uint64(2) + _ID_BITS + _ID_BITS
    return place + (value & uint64(3))


@compiled(*_PLAIN_TUPLES, BYTES, INT64, INT64S, INT64, INT64, UINT32S, INT64S, INT64, UINT32S, INT64)
def write_ids(table, scratch, memory, data, start, ends, first, count, border_ids, cuts, border, out, size):
    """Write the ids of pretokens `first` to `count`, the first beginning at `start`, to `out` from `size` on.

    An end that is not positive is that of a border; `border` is the number of the next one. Its place among the ids is
    written to `cuts`, its id to `out`. `out` needs room for two more than an id a byte.
    Returns (first, start, border, size) where things stand, which is before the end if the memory is full.
    """
    entries, texts, ids, used, keys = memory
    # Indices are unsigned where it matters: a signed one is looked at each time, as it might be negative.
    total, place_out = uint64(count), uint64(size)
    for group in range(uint64(first), total, uint64(_GROUP)):
        stop = min(group + uint64(_GROUP), total)
        begin = start
        for k in range(group, stop):
            end = ends[k]
            length = end - begin
            if 0 < length <= _LONGEST:
                low, high = pretoken_key(data, begin, length)
                entry = _WORDS * _place(entries, low, high, uint64(length))
                prefetch(entries, int64(entry))
                at = uint64(3) * (k - group)
                keys[at], keys[at + uint64(1)], keys[at + uint64(2)] = low, high, entry
            begin = abs(end)
        for k in range(group, stop):
            end = ends[k]
            if end <= 0:
                cuts[border] = int64(place_out)
                if border_ids[border] != NO_ID:
                    out[place_out] = border_ids[border]
                    place_out += uint64(1)
                border += 1
                start = -end
                continue
            length = end - start
            at = uint64(3) * (k - group)
            low, high, entry = keys[at], keys[at + uint64(1)], keys[at + uint64(2)]
            told = entries[entry + uint64(2)]
            # First what nearly all are: a short pretoken of few ids that stands where it is looked for.
            value = entries[entry + uint64(3)]
            differs = (entries[entry] ^ low) | (entries[entry + uint64(1)] ^ high) | (told ^ uint64(length))
            if differs == uint64(0) and length <= INLINE and value & uint64(3):
                place_out = _write_packed(value, out, place_out)
                start = end
                continue
            place = entry // _WORDS
            lookups = 0 if length <= _LONGEST else _LOOKUPS
            while lookups < _LOOKUPS:
                entry = _WORDS * place
                told = entries[entry + uint64(2)]
                # One branch for all that has to agree, as it nearly always does.
                differs = (entries[entry] ^ low) | (entries[entry + uint64(1)] ^ high) | (told & _LOW_WORD ^ uint64(length))
                if told == uint64(0) or (
                    differs == uint64(0)
                    and (length <= INLINE or equal_bytes(data, start, texts, int64(told >> uint64(32)), length))
                ):
                    break
                place = _next_place(entries, place)
                lookups += 1
            remembered = lookups < _LOOKUPS
            if remembered and told:
                value = entries[entry + uint64(3)]
                if value & uint64(3):
                    place_out = _write_packed(value, out, place_out)
                else:
                    value >>= uint64(2)
                    number = uint64(ids[value])
                    for index in range(number):
                        out[place_out + index] = ids[value + uint64(1) + index]
                    place_out += number
                start = end
                continue
            if remembered and (
                2 * used[0] >= len(entries) // 4 or used[1] + length > len(texts) or used[2] + length >= len(ids)
            ):
                return int64(k), start, border, int64(place_out)
            size = int64(place_out)
            # One call for all cases, as it is compiled into each place that it is called from.
            after = merge_bytes(table, scratch, data, start, end, out, size)
            if remembered:
                number = after - size
                value, largest = uint64(number), uint64(0)
                for index in range(min(number, 3)):
                    value |= uint64(out[size + index]) << uint64(2 + 20 * index)
                    largest = max(largest, uint64(out[size + index]))
                if number > 3 or largest > _ID:
                    value = uint64(used[2]) << uint64(2)
                    ids[used[2]] = number
                    for index in range(number):
                        ids[used[2] + 1 + index] = out[size + index]
                    used[2] += 1 + number
                told = uint64(length)
                if length > INLINE:
                    told |= uint64(used[1]) << uint64(32)
                    copy_bytes(texts, used[1], data, start, length)
                    used[1] += length
                entries[entry], entries[entry + uint64(1)] = low, high
                entries[entry + uint64(2)], entries[entry + uint64(3)] = told, value
                used[0] += 1
            place_out = uint64(after)
            start = end
    return count, start, border, int64(place_out)
