"""Learn the merges of a byte-level BPE from a text file."""

import heapq
import warnings
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError
from .patterns import check_special_tokens
from .pretokens import count_pretokens

_BLANK = -1
_COMPLEMENT = bytes(range(255, -1, -1))


def train_bpe(
    input_path: Path | str, vocab_size: int, special_tokens: Sequence[str] = (), *, num_workers: int | None = None
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Return (vocab, merges) learned from the text file.

    Ids: 0..255 are the bytes, then one id a merge in the order learned, special tokens last. The most frequent pair
    merges first, the lexicographically greater of equals; special tokens are hard boundaries and never counted. The
    result does not depend on `num_workers` (None: the machine's cores, one for a small file). The file is read as
    UTF-8, what is not UTF-8 as U+FFFD. A text too small for `vocab_size` gives a smaller vocabulary and a warning.

    Raises `UserError` for a missing or empty file, a `vocab_size` below 256 + the special tokens, and special tokens
    that are empty, doubled or a single byte.
    """
    special_tokens = check_special_tokens(special_tokens)
    for token in special_tokens:
        if len(token.encode()) == 1:
            raise UserError(f"special token {token!r} is a single byte, and every byte is in the vocabulary already")
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}: at least {smallest} is needed, 256 bytes and {len(special_tokens)} special"
        )
    counts = count_pretokens(input_path, special_tokens, num_workers=num_workers)
    merges = learn_merges(counts, vocab_size - smallest)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += [token.encode() for token in special_tokens]
    if len(tokens) < vocab_size:
        warnings.warn(
            f"{input_path} has no more pairs to merge: the vocabulary has {len(tokens)} tokens, not {vocab_size}", stacklevel=2
        )
    return dict(enumerate(tokens)), merges


def learn_merges(pretoken_counts: Mapping[str, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """Return the first `num_merges` merges of the counted pretokens, fewer where no pair is left.

    Time and memory are linear in the bytes of the distinct pretokens, but for the heap of pairs.
    """
    corpus = _Corpus(pretoken_counts)
    tokens = [bytes([byte]) for byte in range(256)]
    order = [_descending(token) for token in tokens]
    heap = [(-count, order[x], order[y], (x, y)) for (x, y), count in corpus.counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    with tqdm(total=num_merges, desc="learning merges", unit="merge", disable=None) as bar:
        while heap and len(merges) < num_merges:
            known, first, second, pair = heapq.heappop(heap)
            count = corpus.counts[pair]
            if count < -known:
                # Counts only fall, so an entry that claims too much is put right when it comes to the top, not before.
                if count:
                    heapq.heappush(heap, (-count, first, second, pair))
                continue
            left, right = tokens[pair[0]], tokens[pair[1]]
            merges.append((left, right))
            tokens.append(left + right)
            order.append(_descending(left + right))
            for x, y in corpus.merge(pair):
                # A pair inside a run of the merged one may be gone by the end of the step that made it.
                if count := corpus.counts[x, y]:
                    heapq.heappush(heap, (-count, order[x], order[y], (x, y)))
            bar.update()
    return merges


class _Corpus:
    """The distinct pretokens as tokens merge in them, with the count and the places of every pair.

    All pretokens lie in one list, a cell a byte, a blank cell between them. A token keeps its id in its first and its
    last cell, so that its neighbours follow from the sizes of tokens and need no links. A pair comes into being only in
    the step that makes the newer of its tokens, and from then on can only vanish, place by place: its places are written
    once, in ascending order, and its count only falls.
    """

    def __init__(self, pretoken_counts: Mapping[str, int]):
        self.counts: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._sizes = [1] * 256
        self._cells = [_BLANK]
        self._weights = [0]
        for pretoken, count in pretoken_counts.items():
            word = pretoken.encode()
            self._cells += [*word, _BLANK]
            self._weights += [count] * (len(word) + 1)
        self._places: dict[tuple[int, int], array[int]] = defaultdict(_new_places)
        for place, pair in enumerate(pairwise(self._cells)):
            if _BLANK not in pair:
                self.counts[pair] += self._weights[place]
                self._places[pair].append(place)

    def merge(self, pair: tuple[int, int]) -> Iterable[tuple[int, int]]:
        """Make a new token, with the next free id, of every occurrence of the pair; return the pairs this brings about."""
        cells, weights, sizes, counts = self._cells, self._weights, self._sizes, self.counts
        x, y = pair
        size_x, size_y = sizes[x], sizes[y]
        merged = len(sizes)
        sizes.append(size_x + size_y)
        created: dict[tuple[int, int], array[int]] = defaultdict(_new_places)
        for start in self._places.pop(pair):
            middle = start + size_x
            if cells[start] != x or cells[middle] != y:
                continue
            end = middle + size_y
            cells[middle] = _BLANK
            cells[start] = cells[end - 1] = merged
            weight = weights[start]
            before, after = cells[start - 1], cells[end]
            if before != _BLANK:
                counts[before, x] -= weight
                counts[before, merged] += weight
                created[before, merged].append(start - sizes[before])
            if after != _BLANK:
                counts[y, after] -= weight
                counts[merged, after] += weight
                created[merged, after].append(start)
        del counts[pair]
        self._places.update(created)
        return created


def _new_places() -> "array[int]":
    return array("q")


def _descending(token: bytes) -> str:
    # Sorts tokens from the greatest to the least; the closing character puts a token before its own beginnings.
    return token.translate(_COMPLEMENT).decode("latin-1") + "\u0100"
