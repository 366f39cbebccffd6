"""Merge the bytes of a pretoken one pair after another, compiled: for merges in an order that `backtracking.py` does not take.

`reference.py` says what the result has to be: of all pairs the merge of the lowest rank first, the leftmost of equals. Looking
through all pairs after each merge takes quadratic time, so that long pretokens are left to Python.
"""

from typing import NamedTuple

import numpy as np

from ..compiled.jit import BYTES, INT64S, UINT8S, UINT32S, UINT64S, compiled, helper, uint64
from .decoder import TokenTable
from .pretoken_cache import LONGEST

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_NEVER = np.uint64(0xFFFFFFFFFFFFFFFF)


class RankTable(NamedTuple):
    """`pairs` is a hash table of two words an entry: the ids of left and right, plus 1, and rank and product; 32 bits each.

    `byte_ids` (uint32) are the ids of the bytes; `ranks` is scratch.
    """

    pairs: np.ndarray
    byte_ids: np.ndarray
    ranks: np.ndarray


def rank_table(merges: np.ndarray, byte_ids: np.ndarray) -> RankTable:
    """Return the table of merges, int64 of shape (n, 3): the ids of left, right and merged token."""
    pairs = np.zeros(2 << max(4, (2 * len(merges)).bit_length()), np.uint64)
    _add_pairs(pairs, merges.reshape(-1))
    return RankTable(pairs, byte_ids.astype(np.uint32), np.empty(LONGEST, np.uint64))


def no_rank_table() -> RankTable:
    """Return the table that stands for none."""
    return RankTable(np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty(0, np.uint64))


def tokens_made(table: RankTable, tokens: TokenTable) -> set[int]:
    """Return the ids of the tokens that their own bytes merge to; long ones are left out."""
    made = np.zeros(len(tokens.sizes), np.uint8)
    _find_made(*table, tokens.data, tokens.offsets, np.empty(LONGEST, np.uint32), made)
    return set(np.flatnonzero(made).tolist())


@helper
def _pair(pairs, left, right):
    """Return the rank and the product of a pair in one word, `_NEVER` for one that does not merge."""
    key = (uint64(left) << uint64(32) | uint64(right)) + uint64(1)
    mask = uint64(len(pairs) // 2 - 1)
    place = (key * _SPREAD) >> uint64(32) & mask
    while pairs[uint64(2) * place]:
        if pairs[uint64(2) * place] == key:
            return pairs[uint64(2) * place + uint64(1)]
        place = (place + uint64(1)) & mask
    return _NEVER


@helper
def merge_by_rank(pairs, byte_ids, ranks, data, start, size, out, begin):
    """Write the ids of the `size` bytes from `start` on, at most `LONGEST`, to `out` from `begin` on; return their number."""
    for k in range(size):
        out[begin + k] = byte_ids[data[start + k]]
        if k > 0:
            ranks[k - 1] = _pair(pairs, out[begin + k - 1], out[begin + k])
    while size > 1:
        best = 0
        for k in range(1, size - 1):
            # The rank is above the product, and the same for equals.
            if ranks[k] >> uint64(32) < ranks[best] >> uint64(32):
                best = k
        if ranks[best] == _NEVER:
            break
        out[begin + best] = np.uint32(ranks[best] & uint64(0xFFFFFFFF))
        for k in range(best + 1, size - 1):
            out[begin + k] = out[begin + k + 1]
            ranks[k - 1] = ranks[k]
        size -= 1
        if best + 1 < size:
            ranks[best] = _pair(pairs, out[begin + best], out[begin + best + 1])
        if best > 0:
            ranks[best - 1] = _pair(pairs, out[begin + best - 1], out[begin + best])
    return size


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


@compiled(UINT64S, UINT32S, UINT64S, BYTES, INT64S, UINT32S, UINT8S)
def _find_made(pairs, byte_ids, ranks, data, offsets, out, made):
    for id in range(len(made)):
        size = offsets[id + 1] - offsets[id]
        if 0 < size <= len(out):
            number = merge_by_rank(pairs, byte_ids, ranks, data, offsets[id], size, out, 0)
            made[id] = number == 1 and out[0] == id
