"""Learn the merges of a byte-level BPE from counted pretokens.

The naive trainer counts all pairs, merges the most frequent one everywhere, and repeats. `merge_loop.py` finds the same
merges in time linear in the text, except for a heap of pairs. `reference.py` does the same in plain Python, for small texts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np

from ...errors import UserError
from ..compiled.work import Work
from ..counting.pretoken_counts import PretokenCounts
from ..reference import Ties, alphabet, learn
from . import merge_loop
from .merge_loop import NO_PAIR, Corpus, Created, Heap, Pairs, State, Tokens, fill_cells, merge_steps, place_byte_pairs

__all__ = ["Merges", "Ties", "check_number", "check_rules", "learn_merges"]

# One unit is one byte of a distinct pretoken times one merge.
_LEARNING = Work("trainer", [merge_loop], units_per_second=3e7, compile_seconds=4)

_MOST = np.iinfo(np.int64).max
# Merges between two calls of `progress`.
_STRIDE = 256


@dataclass(frozen=True, eq=False)
class Merges:
    """Merges in the order learned. Ids 0..255 are the bytes; merge i produces id 256 + i.

    `pairs` holds the ids of the left and right token, int32 of shape (n, 2). `counts` holds the number of occurrences of each
    pair when it merged, int64 of shape (n,); 0 for a known merge that does not occur.
    """

    pairs: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)

    def tokens(self) -> list[bytes]:
        """Return the bytes of every id from 0 to 255 + n."""
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in self.pairs.tolist():
            tokens.append(tokens[left] + tokens[right])
        return tokens

    def as_bytes(self) -> list[tuple[bytes, bytes]]:
        """Return the left and right token of every merge."""
        tokens = self.tokens()
        return [(tokens[left], tokens[right]) for left, right in self.pairs.tolist()]


def learn_merges(
    counts: PretokenCounts,
    num_merges: int,
    *,
    ties: Ties = "cs336",
    min_frequency: int = 1,
    max_token_length: int | None = None,
    known: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> Merges:
    """Return the first `num_merges` merges, or fewer if no pair is left.

    The most frequent pair merges first. Of equally frequent pairs: with `ties="cs336"`, the one with the greatest (left,
    right) bytes; with `"huggingface"`, the one with the least (left, right) ids, where bytes are numbered in the order of
    GPT-2's alphabet. Only the tie rule is Hugging Face's: that library counts `max_token_length` differently. A pair with
    fewer than `min_frequency` occurrences never merges, nor does a pair that would make a token of more than
    `max_token_length` bytes.

    `known`, int of shape (k, 2) in the ids of `Merges`, are initial merges: they come first regardless of the counts, and are
    part of `num_merges`. `progress` is called periodically with the number of merges made.

    Raises a `UserError` for options out of range and for more text than 32-bit places can address.
    """
    check_rules(ties, min_frequency, max_token_length)
    if not counts.is_sound:
        raise ValueError("the counts are inconsistent: ends must ascend to the end of the data, and counts must be positive")
    longest = _MOST if max_token_length is None else max_token_length
    known = np.empty((0, 2), np.int32) if known is None else known[:num_merges]
    _check_known(known, longest)

    # Each merge, except a known one, shortens the text by at least one token.
    num_merges = min(num_merges, len(known) + len(counts.data))
    if not _LEARNING.is_compiled(num_merges * len(counts.data)):
        rules = {"ties": ties, "min_frequency": min_frequency, "max_token_length": max_token_length}
        return _learn_in_python(learn(dict(counts.items()), num_merges, **rules, known=map(tuple, known.tolist())), progress)
    pairs = np.empty((num_merges, 2), np.int32)
    pairs[: len(known)] = known
    merge_counts = np.zeros(num_merges, np.int64)
    arrays, state = _start(counts, num_merges, ties)
    while state.merges < num_merges:
        stop = min(num_merges, state.merges + _STRIDE)
        numbers = len(known), stop, min_frequency, longest
        state, lacking = merge_steps(*arrays, pairs, merge_counts, *numbers, state)
        if progress:
            progress(state.merges)
        if lacking:
            arrays = _grow_arrays(arrays, state, int(lacking))
        elif state.merges < stop:
            break
    return Merges(pairs[: state.merges], merge_counts[: state.merges])


def _learn_in_python(steps: Iterator[tuple[int, int, int]], progress: Callable[[int], None] | None) -> Merges:
    made: list[tuple[int, int, int]] = []
    while found := list(islice(steps, _STRIDE)):
        made += found
        if progress:
            progress(len(made))
    rows = np.array(made, np.int64).reshape(-1, 3)
    return Merges(rows[:, :2].astype(np.int32), rows[:, 2].copy())


def check_rules(ties: Ties, min_frequency: int, max_token_length: int | None) -> None:
    """Raise a `UserError` for an option of `learn_merges` that is out of range."""
    if ties not in get_args(Ties):
        raise UserError(f"ties is {ties!r}: expected one of {', '.join(get_args(Ties))}")
    check_number("min_frequency", min_frequency, 1)
    if max_token_length is not None:
        check_number("max_token_length", max_token_length, 2)


def check_number(name: str, number: Any, least: int) -> None:
    """Raise a `UserError` unless `number` is an integer of at least `least` that fits into 64 bits."""
    if not isinstance(number, int | np.integer) or not least <= number <= _MOST:
        raise UserError(f"{name} is {number!r}: expected an integer from {least} to 2^63 - 1")


def _check_known(known: np.ndarray, longest: int) -> None:
    lengths = [1] * 256
    for index, (left, right) in enumerate(known.tolist()):
        if not (0 <= left < 256 + index and 0 <= right < 256 + index):
            raise ValueError(f"known merge {index} is of {left} and {right}: expected ids from 0 to {255 + index}")
        lengths.append(lengths[left] + lengths[right])
        if lengths[-1] > longest:
            raise UserError(f"max_token_length is {longest}: expected at least {lengths[-1]}, for known merge {index}")


_Arrays = tuple[Corpus, Tokens, Pairs, Heap, Created]


def _start(counts: PretokenCounts, num_merges: int, ties: Ties) -> tuple[_Arrays, State]:
    num_cells = len(counts.data) + len(counts) + 1
    if num_cells >= 1 << 31:
        raise UserError(f"the distinct pretokens have {len(counts.data)} bytes: expected less than 2^31")
    corpus = Corpus(_read_only(counts.data), np.empty((num_cells, 3), np.int32), _read_only(counts.counts))
    pair_counts = np.zeros(1 << 16, np.int64)
    sizes = np.zeros(1 << 16, np.int64)
    fill_cells(corpus, _read_only(counts.ends), pair_counts, sizes)
    found = np.flatnonzero(sizes)
    index = np.full(1 << 16, NO_PAIR, np.int64)
    index[found] = np.arange(len(found))
    starts = np.cumsum(sizes[found]) - sizes[found]
    pairs = Pairs(
        lefts=(found >> 8).astype(np.int32),
        rights=(found & 255).astype(np.int32),
        counts=pair_counts[found],
        slices=np.concatenate([[0], starts]),
        places=np.empty(sizes.sum(), np.int32),
    )
    place_byte_pairs(corpus, pairs, index)
    none = np.empty(0, np.int32)
    arrays = corpus, _tokens(num_merges, ties), pairs, Heap(none, np.empty(0, np.int64)), Created(none, none)
    arrays[1].pairs_before[256] = len(found)
    state = State(merges=0, pairs=len(found), seen=0, heap=0, threshold=_MOST)
    return _grow_arrays(arrays, state, int(sizes.max(initial=0))), state


def _read_only(array: np.ndarray) -> np.ndarray:
    # The loop is compiled for read-only arrays, such as arrays of a mapped file.
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _tokens(num_merges: int, ties: Ties) -> Tokens:
    size = 256 + num_merges
    if ties == "cs336":
        # A key is the first eight bytes of a token; the loop fills in the keys of merged tokens.
        keys = np.zeros(size, np.uint64)
        keys[:256] = np.arange(256, dtype=np.uint64) << np.uint64(56)
    else:
        keys = ~np.arange(size, dtype=np.uint64)
        keys[alphabet()] = keys[:256].copy()
    return Tokens(
        lengths=np.ones(size, np.int64),
        keys=keys,
        begins=np.zeros(size, np.int64),
        pairs_before=np.zeros(size + 1, np.int64),
        with_left=np.full(size, NO_PAIR, np.int32),
        with_right=np.full(size, NO_PAIR, np.int32),
    )


def _grow_arrays(arrays: _Arrays, state: State, lacking: int) -> _Arrays:
    """Return the arrays with space for a step that merges a pair with `lacking` places."""
    corpus, tokens, pairs, heap, created = arrays
    num_pairs, num_places = state.pairs, int(pairs.slices[state.pairs])
    pair_size, place_size, created_size = len(pairs.counts), len(pairs.places), len(created.places)
    if (needed := num_pairs + min(2 * lacking, 2 * len(tokens.lengths)) + 1) > pair_size:
        pair_size = max(needed, num_pairs * 3 // 2)
    if (needed := num_places + 2 * lacking) > place_size:
        place_size = max(needed, num_places * 3 // 2)
    created_size = max(created_size, 2 * lacking)
    pairs = Pairs(
        lefts=_resized(pairs.lefts, pair_size, num_pairs),
        rights=_resized(pairs.rights, pair_size, num_pairs),
        counts=_resized(pairs.counts, pair_size, num_pairs),
        slices=_resized(pairs.slices, pair_size + 1, num_pairs + 1),
        places=_resized(pairs.places, place_size, num_places),
    )
    heap = Heap(_resized(heap.pairs, pair_size, state.heap), _resized(heap.counts, pair_size, state.heap))
    created = Created(_resized(created.pairs, created_size, 0), _resized(created.places, created_size, 0))
    return corpus, tokens, pairs, heap, created


def _resized(array: np.ndarray, size: int, used: int) -> np.ndarray:
    if len(array) == size:
        return array
    larger = np.empty(size, array.dtype)
    larger[:used] = array[:used]
    return larger
