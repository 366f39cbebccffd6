"""Merge the bytes of a pretoken pair by pair, compiled: for orders of merges that `backtracking.py` does not support.

The specification is `reference.py`: each step applies the merge of the lowest rank, at the leftmost of equal places. Short
pretokens are scanned after each merge; the pairs of long ones are kept in a heap, so that time is O(n log n).
"""

from typing import NamedTuple

import numpy as np

from ..compiled.jit import BYTES, INT32S, INT64S, UINT8S, UINT32S, UINT64S, compiled, helper, int64, uint64
from .decoder import TokenTable

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_LOW_WORD = np.uint64(0xFFFFFFFF)
# Up to this length, scanning all pairs after each merge is faster than a heap.
_SHORT = 64
_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)


class RankTable(NamedTuple):
    """`pairs` is a hash table with two words per entry: the ids of left and right, plus 1; rank and product. Each has 32 bits.

    `byte_ids` (uint32) are the ids of the bytes.
    """

    pairs: np.ndarray
    byte_ids: np.ndarray


class RankScratch(NamedTuple):
    """Buffers: for each byte, the rank of the pair that begins there, and the previous and next places; a heap."""

    ranks: np.ndarray
    before: np.ndarray
    after: np.ndarray
    heap: np.ndarray


def rank_table(merges: np.ndarray, byte_ids: np.ndarray) -> RankTable:
    """Return the table of merges, int64 of shape (n, 3): the ids of left, right and merged token."""
    pairs = np.zeros(2 << max(4, (2 * len(merges)).bit_length()), np.uint64)
    _add_pairs(pairs, merges.reshape(-1))
    return RankTable(pairs, byte_ids.astype(np.uint32))


def no_rank_table() -> RankTable:
    """Return an empty table, which selects `backtracking.py`."""
    return RankTable(np.empty(0, np.uint64), np.empty(0, np.uint32))


def rank_scratch(num_bytes: int) -> RankScratch:
    """Return the buffers for a pretoken of `num_bytes` bytes."""
    places = np.empty(num_bytes, np.int32), np.empty(num_bytes, np.int32)
    # Each merge removes a pair and adds at most two.
    return RankScratch(np.empty(num_bytes, np.uint64), *places, np.empty(3 * num_bytes, np.uint64))


def tokens_made(table: RankTable, tokens: TokenTable) -> set[int]:
    """Return the ids of the tokens that their own bytes merge to."""
    made = np.zeros(len(tokens.sizes), np.uint8)
    longest = int(tokens.sizes.max())
    _find_made(*table, *rank_scratch(longest), tokens.data, tokens.offsets, np.empty(longest, np.uint32), made)
    return set(np.flatnonzero(made).tolist())


@helper
def _pair(pairs, left, right):
    """Return the rank and the product of a pair in one word, or `_NEVER` if it does not merge."""
    key = (uint64(left) << uint64(32) | uint64(right)) + uint64(1)
    mask = uint64(len(pairs) // 2 - 1)
    place = (key * _SPREAD) >> uint64(32) & mask
    while pairs[uint64(2) * place]:
        if pairs[uint64(2) * place] == key:
            return pairs[uint64(2) * place + uint64(1)]
        place = (place + uint64(1)) & mask
    return _NEVER


@helper
def _merge_short(pairs, ranks, size, out, begin):
    """Merge the `size` ids in `out` from `begin` on, with `ranks` of their pairs; return the number of remaining ids."""
    while size > 1:
        best = 0
        for k in range(1, size - 1):
            # The rank is in the high bits. Equal pairs have equal words, so the leftmost is kept.
            if ranks[k] < ranks[best]:
                best = k
        if ranks[best] == _NEVER:
            break
        out[begin + best] = np.uint32(ranks[best] & _LOW_WORD)
        for k in range(best + 1, size - 1):
            out[begin + k] = out[begin + k + 1]
            ranks[k - 1] = ranks[k]
        size -= 1
        if best + 1 < size:
            ranks[best] = _pair(pairs, out[begin + best], out[begin + best + 1])
        if best > 0:
            ranks[best - 1] = _pair(pairs, out[begin + best - 1], out[begin + best])
    return size


@helper
def _push(heap, used, entry):
    """Add an entry to a min-heap of `used` entries."""
    place = used
    while place > 0 and heap[(place - 1) >> 1] > entry:
        heap[place] = heap[(place - 1) >> 1]
        place = (place - 1) >> 1
    heap[place] = entry


@helper
def _pop(heap, used):
    """Remove the smallest of `used` entries."""
    entry, place = heap[used - 1], 0
    while True:
        child = 2 * place + 1
        if child + 1 < used - 1 and heap[child + 1] < heap[child]:
            child += 1
        if child >= used - 1 or heap[child] >= entry:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = entry


@helper
def _merge_long(pairs, ranks, before, after, heap, size, out, begin):
    """Do the same as `_merge_short` in O(n log n)."""
    used = 0
    for k in range(size):
        before[k], after[k] = k - 1, k + 1
    ranks[size - 1] = _NEVER
    for k in range(size - 1):
        if ranks[k] != _NEVER:
            _push(heap, used, ranks[k] & ~_LOW_WORD | uint64(k))
            used += 1
    while used > 0:
        rank, k = heap[0] >> uint64(32), int64(heap[0] & _LOW_WORD)
        _pop(heap, used)
        used -= 1
        # Skip entries whose pair has changed since they were added.
        if ranks[k] == _NEVER or ranks[k] >> uint64(32) != rank:
            continue
        out[begin + k] = np.uint32(ranks[k] & _LOW_WORD)
        gone = int64(after[k])
        ranks[gone] = _NEVER
        following = int64(after[gone])
        after[k] = following
        if following < size:
            before[following] = k
        for place in (int64(before[k]), k):
            if place >= 0:
                ranks[place] = _NEVER
                if after[place] < size:
                    ranks[place] = _pair(pairs, out[begin + place], out[begin + after[place]])
                    if ranks[place] != _NEVER:
                        _push(heap, used, ranks[place] & ~_LOW_WORD | uint64(place))
                        used += 1
    number, k = 0, int64(0)
    while k < size:
        out[begin + number] = out[begin + k]
        number += 1
        k = int64(after[k])
    return number


@helper
def merge_by_rank(pairs, byte_ids, scratch, data, start, size, out, begin):
    """Write the ids of the `size` bytes from `start` on to `out` from `begin` on; return their number."""
    ranks, before, after, heap = scratch
    for k in range(size):
        out[begin + k] = byte_ids[data[start + k]]
        if k > 0:
            ranks[k - 1] = _pair(pairs, out[begin + k - 1], out[begin + k])
    if size <= _SHORT:
        return _merge_short(pairs, ranks, size, out, begin)
    return _merge_long(pairs, ranks, before, after, heap, size, out, begin)


@compiled(UINT64S, INT64S)
def _add_pairs(pairs, merges):
    mask = uint64(len(pairs) // 2 - 1)
    for rank in range(len(merges) // 3):
        key = (uint64(merges[3 * rank]) << uint64(32) | uint64(merges[3 * rank + 1])) + uint64(1)
        place = (key * _SPREAD) >> uint64(32) & mask
        while pairs[uint64(2) * place]:
            place = (place + uint64(1)) & mask
        pairs[uint64(2) * place] = key
        pairs[uint64(2) * place + uint64(1)] = uint64(rank) << uint64(32) | uint64(merges[3 * rank + 2])


@compiled(UINT64S, UINT32S, UINT64S, INT32S, INT32S, UINT64S, BYTES, INT64S, UINT32S, UINT8S)
def _find_made(pairs, byte_ids, ranks, before, after, heap, data, offsets, out, made):
    scratch = ranks, before, after, heap
    for id in range(len(made)):
        size = offsets[id + 1] - offsets[id]
        if size > 0:
            number = merge_by_rank(pairs, byte_ids, scratch, data, offsets[id], size, out, 0)
            made[id] = number == 1 and out[0] == id
