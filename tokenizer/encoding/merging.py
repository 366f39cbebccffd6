"""Merge the bytes of one pretoken: the merge of the lowest rank first, the leftmost of equals.

This is what encoding means, for merges in any order. For those that training gives `backtracking.py` finds the same, compiled.
"""

import heapq
from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise

# Up to here looking through all pairs again after each merge is faster than keeping them in a heap.
_SHORT = 48


def merge_pretoken(ids: list[int], ranks: Mapping[tuple[int, int], int], products: Sequence[int]) -> list[int]:
    """Return the ids that remain when no merge applies any more; `ids` is used up.

    `ranks` maps a pair of ids to the rank of its merge, `products` a rank to the id it makes. Time is O(n log n).
    """
    if len(ids) > _SHORT:
        return _merge_long(ids, ranks, products)
    never = len(products)
    while len(ids) > 1:
        found = [ranks.get(pair, never) for pair in pairwise(ids)]
        rank = min(found)
        if rank == never:
            break
        place = found.index(rank)
        ids[place : place + 2] = [products[rank]]
    return ids


def _merge_long(ids: list[int], ranks: Mapping[tuple[int, int], int], products: Sequence[int]) -> list[int]:
    size = len(ids)
    before = array("q", range(-1, size - 1))
    after = array("q", range(1, size + 1))
    # One number orders candidates by rank, then place, and takes a third of the memory of a pair.
    heap = [ranks[pair] * size + place for place, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, place = divmod(heapq.heappop(heap), size)
        second = after[place]
        # The tokens may have merged with others since. A token that is gone has the id -1, which is in no pair.
        if second == size or ranks.get((ids[place], ids[second])) != rank:
            continue
        ids[place], ids[second] = products[rank], -1
        third = after[place] = after[second]
        if third < size:
            before[third] = place
        for first in (before[place], place):
            if first >= 0 and after[first] < size:
                candidate = ranks.get((ids[first], ids[after[first]]))
                if candidate is not None:
                    heapq.heappush(heap, candidate * size + first)
    return [id for id in ids if id >= 0]
