"""Byte-level BPE in plain Python: the specification of training, encoding and decoding. Read it first.

Tests compare the compiled loops with it. It also runs for texts too small to justify compiling: see `compiled/work.py`. Ids
0..255 are the bytes here; merge i produces id 256 + i.

    words = Counter(pretoken.encode() for pretoken in split_text(text))     split_text: see text/patterns.py
    merges = [(left, right) for left, right, _ in learn(words, 1000)]
    ids = [id for pretoken in split_text(text) for id in merge_pretoken(list(pretoken.encode()), *ranks(merges))]
    decode(tokens(merges), ids) == text.encode()
"""

import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, pairwise
from typing import Any, Literal

Pair = tuple[int, int]
Ties = Literal["cs336", "huggingface"]

# Up to this length, scanning all pairs after each merge is faster than a heap.
_SHORT = 48


def learn(
    words: Mapping[bytes, int],
    num_merges: int,
    *,
    ties: Ties = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    known: Iterable[Pair] = (),
) -> Iterator[tuple[int, int, int]]:
    """Yield the left id, right id and count of each merge: the count of the pair before it merges.

    `words` maps each pretoken to its number of occurrences. For the rules see `learner.py`. Pairs are counted once; a merge
    then updates only the counts of the words that contain its pair.
    """
    spellings = [list(word) for word in words]
    weights = list(words.values())
    made = [bytes([byte]) for byte in range(256)]
    frequencies: dict[Pair, int] = defaultdict(int)
    # The words that contain a pair, or contained it once.
    places: dict[Pair, set[int]] = defaultdict(set)

    def add(index: int, weight: int) -> None:
        for pair in pairwise(spellings[index]):
            if max_token_length is not None and len(made[pair[0]]) + len(made[pair[1]]) > max_token_length:
                continue
            frequencies[pair] += weight
            if weight > 0:
                places[pair].add(index)
            elif not frequencies[pair]:
                del frequencies[pair]

    for index, weight in enumerate(weights):
        add(index, weight)
    precedence = _precedence(ties, made)
    given = iter(known)
    for merged in range(256, 256 + num_merges):
        pair = next(given, None)
        if pair is None:
            highest = max(frequencies.values(), default=0)
            if highest < max(min_frequency, 1):
                return
            pair = max((each for each, frequency in frequencies.items() if frequency == highest), key=precedence)
        frequency = frequencies.get(pair, 0)
        made.append(made[pair[0]] + made[pair[1]])
        for index in places.pop(pair, ()):
            add(index, -weights[index])
            spellings[index] = merge_pair(spellings[index], pair, merged)
            add(index, weights[index])
        yield *pair, frequency


def _precedence(ties: Ties, made: Sequence[bytes]) -> Callable[[Pair], Any]:
    """Return the sort key of equally frequent pairs: the pair with the greatest key merges first."""
    if ties == "cs336":
        return lambda pair: (made[pair[0]], made[pair[1]])
    rank = {byte: place for place, byte in enumerate(alphabet())}
    return lambda pair: tuple(-rank.get(id, id) for id in pair)


def alphabet() -> list[int]:
    """Return the bytes in the order of GPT-2's alphabet: those that print in Latin-1 first."""
    return sorted(range(256), key=lambda byte: (byte == ord(" ") or not chr(byte).isprintable(), byte))


def merge_pair(ids: Sequence[int], pair: Pair, merged: int) -> list[int]:
    """Return the ids with each occurrence of the pair, from left to right, replaced by `merged`."""
    result: list[int] = []
    place = 0
    while place < len(ids):
        if tuple(ids[place : place + 2]) == pair:
            result.append(merged)
            place += 2
        else:
            result.append(ids[place])
            place += 1
    return result


def tokens(merges: Iterable[Pair]) -> list[bytes]:
    """Return the bytes of every id."""
    made = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        made.append(made[left] + made[right])
    return made


def ranks(merges: Iterable[Pair]) -> tuple[dict[Pair, int], Sequence[int]]:
    """Return the rank of each merge and the id that each rank produces, the arguments of `merge_pretoken`."""
    ranked = dict(zip(merges, count()))
    return ranked, range(256, 256 + len(ranked))


def merge_pretoken(ids: list[int], ranks: Mapping[Pair, int], products: Sequence[int]) -> list[int]:
    """Return the ids after all merges; `ids` is consumed.

    Each step applies the merge of the lowest rank, at the leftmost of equal places. This defines encoding, for merges in any
    order. `ranks` maps a pair of ids to the rank of its merge, `products` a rank to the id it produces. Time is O(n log n).
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


def _merge_long(ids: list[int], ranks: Mapping[Pair, int], products: Sequence[int]) -> list[int]:
    size = len(ids)
    before = array("q", range(-1, size - 1))
    after = array("q", range(1, size + 1))
    # One integer orders candidates by rank, then place, and takes a third of the memory of a tuple.
    heap = [ranks[pair] * size + place for place, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, place = divmod(heapq.heappop(heap), size)
        second = after[place]
        # Skip entries whose tokens have merged since. A removed token has id -1, which is in no pair.
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


def decode(tokens: Sequence[bytes], ids: Iterable[int]) -> bytes:
    """Return the bytes of the ids."""
    return b"".join(map(tokens.__getitem__, ids))
