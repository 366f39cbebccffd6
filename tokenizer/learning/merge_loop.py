"""The compiled training loop of `learner.py`: pretokens are stored as cells, and merges are applied to them one by one.

All occurrences of a pair arise in the step that creates the newer of its two tokens; afterwards they can only disappear.
Therefore the places of a pair are written once, as one ascending slice, and its count only falls. Each cell stores the pair
that begins there, so checking a place takes one read: there is no table of pairs, and no table from pairs to pretokens.
"""

from typing import NamedTuple

import numpy as np

from ..compiled.intrinsics import prefetch
from ..compiled.jit import BYTES, INT32S, INT64, INT64S, NUMBERS, UINT64S, ArrayType, compiled, helper, tuple_of

# Columns of the cells, one cell per byte: the token whose first or last byte it is, the pair that begins with that token (in
# the cell of its first byte), and the pretoken. Blank cells separate and enclose the pretokens.
TOKEN, PAIR, PRETOKEN = 0, 1, 2
BLANK = NO_PAIR = -1

# The heap holds only pairs whose count reaches a threshold. The threshold falls by this factor when the heap is empty, so
# most pairs never enter the heap.
_FALL = 16


class Corpus(NamedTuple):
    """The text of all pretokens, its cells, and the count of each pretoken."""

    text: np.ndarray
    cells: np.ndarray
    weights: np.ndarray


class Tokens(NamedTuple):
    """For each token: length in bytes, sort key, a cell where it begins, and the number of pairs before it was made.

    Of two pairs with equal counts, the one whose left, then right token has the greater key merges first. For equal keys, the
    bytes from the ninth on decide. Within one step, `with_left` and `with_right` map a neighbor of the new token to their
    pair.
    """

    lengths: np.ndarray
    keys: np.ndarray
    begins: np.ndarray
    pairs_before: np.ndarray
    with_left: np.ndarray
    with_right: np.ndarray


class Pairs(NamedTuple):
    """Pairs in the order of creation: left and right token, count, and places `places[slices[pair]:slices[pair + 1]]`.

    A place is the index of a cell. It is valid as long as the cell holds the pair.
    """

    lefts: np.ndarray
    rights: np.ndarray
    counts: np.ndarray
    slices: np.ndarray
    places: np.ndarray


class Heap(NamedTuple):
    """A binary heap of pairs, with the next one to merge on top; each has the count of its last check."""

    pairs: np.ndarray
    counts: np.ndarray


class Created(NamedTuple):
    """The pairs created in one step, each with a place."""

    pairs: np.ndarray
    places: np.ndarray


class State(NamedTuple):
    """Numbers of merges made, of pairs created, checked for the heap and in the heap; and the threshold of the heap."""

    merges: int
    pairs: int
    seen: int
    heap: int
    threshold: int


_CELLS = ArrayType("int32", 2)
_CORPUS = tuple_of(Corpus, BYTES, _CELLS, NUMBERS)
_TOKENS = tuple_of(Tokens, INT64S, UINT64S, INT64S, INT64S, INT32S, INT32S)
_PAIRS = tuple_of(Pairs, INT32S, INT32S, INT64S, INT64S, INT32S)
_HEAP = tuple_of(Heap, INT32S, INT64S)
_CREATED = tuple_of(Created, INT32S, INT32S)
_STATE = tuple_of(State, INT64, INT64, INT64, INT64, INT64)


@compiled(_CORPUS, NUMBERS, INT64S, INT64S)
def fill_cells(corpus, ends, counts, sizes):
    """Fill the cells, and add up the occurrences of each pair of bytes: in the text, and in the cells."""
    text, cells, weights = corpus
    cells[0, TOKEN], cells[0, PAIR] = BLANK, NO_PAIR
    cell = 1
    start = 0
    for pretoken in range(len(ends)):
        end = ends[pretoken]
        for at in range(start, end):
            cells[cell, TOKEN], cells[cell, PAIR], cells[cell, PRETOKEN] = text[at], NO_PAIR, pretoken
            if at + 1 < end:
                pair = np.int64(text[at]) << 8 | text[at + 1]
                counts[pair] += weights[pretoken]
                sizes[pair] += 1
            cell += 1
        cells[cell, TOKEN], cells[cell, PAIR], cells[cell, PRETOKEN] = BLANK, NO_PAIR, pretoken
        cell += 1
        start = end


@compiled(_CORPUS, _PAIRS, INT64S)
def place_byte_pairs(corpus, pairs, index):
    """Write the places of the pairs of bytes; `index` maps two bytes to their pair. `slices` holds starts at first."""
    cells = corpus.cells
    for cell in range(1, len(cells) - 1):
        left, right = cells[cell, TOKEN], cells[cell + 1, TOKEN]
        if left != BLANK and right != BLANK:
            pair = index[np.int64(left) << 8 | right]
            cells[cell, PAIR] = pair
            # Writing turns the start of the pair into its end, which is the start of the next pair.
            pairs.places[pairs.slices[pair + 1]] = cell
            pairs.slices[pair + 1] += 1


@helper
def _precedes(corpus, tokens, pairs, pair, count, other, other_count):
    """Return whether a pair with a count merges before another pair."""
    if count != other_count:
        return count > other_count
    token, other_token = pairs.lefts[pair], pairs.lefts[other]
    if token == other_token:
        token, other_token = pairs.rights[pair], pairs.rights[other]
    if tokens.keys[token] != tokens.keys[other_token]:
        return tokens.keys[token] > tokens.keys[other_token]
    # Byte 0 of the text has cell 1, and each earlier pretoken adds a blank cell.
    at = tokens.begins[token] - 1 - corpus.cells[tokens.begins[token], PRETOKEN]
    other_at = tokens.begins[other_token] - 1 - corpus.cells[tokens.begins[other_token], PRETOKEN]
    for offset in range(8, min(tokens.lengths[token], tokens.lengths[other_token])):
        if corpus.text[at + offset] != corpus.text[other_at + offset]:
            return corpus.text[at + offset] > corpus.text[other_at + offset]
    return tokens.lengths[token] > tokens.lengths[other_token]


@helper
def _sift(corpus, tokens, pairs, heap, place, size, pair, count):
    """Insert a pair into the heap from the free place `place`: sift it down, then up."""
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and _precedes(
            corpus, tokens, pairs, heap.pairs[below + 1], heap.counts[below + 1], heap.pairs[below], heap.counts[below]
        ):
            below += 1
        heap.pairs[place], heap.counts[place] = heap.pairs[below], heap.counts[below]
        place = below
    while place > 0:
        above = (place - 1) >> 1
        if not _precedes(corpus, tokens, pairs, pair, count, heap.pairs[above], heap.counts[above]):
            break
        heap.pairs[place], heap.counts[place] = heap.pairs[above], heap.counts[above]
        place = above
    heap.pairs[place], heap.counts[place] = pair, count


@helper
def _find(tokens, pairs, left, right):
    """Return the pair of two tokens, or NO_PAIR; it was created together with the newer token."""
    newer = max(left, right)
    start = tokens.pairs_before[newer] if newer >= 256 else 0
    for pair in range(start, tokens.pairs_before[max(newer, 255) + 1]):
        if pairs.lefts[pair] == left and pairs.rights[pair] == right:
            return pair
    return NO_PAIR


@helper
def _prefetch_places(corpus, tokens, pairs, pair, at, end):
    """Prefetch data of later places, in two stages: the second one needs the data of the first."""
    cells = corpus.cells
    if at + 24 < end:
        prefetch(cells, 3 * np.int64(pairs.places[at + 24]))
    if at + 8 < end:
        place = np.int64(pairs.places[at + 8])
        if cells[place, PAIR] == pair:
            prefetch(corpus.weights, np.int64(cells[place, PRETOKEN]))
            prefetch(pairs.counts, np.int64(cells[place + tokens.lengths[pairs.lefts[pair]], PAIR]))
            before = cells[place - 1, TOKEN]
            if before != BLANK:
                prefetch(pairs.counts, np.int64(cells[place - tokens.lengths[before], PAIR]))


@compiled(_CORPUS, _TOKENS, _PAIRS, _HEAP, _CREATED, _CELLS, INT64S, INT64, INT64, INT64, INT64, _STATE)
def merge_steps(
    corpus,
    tokens,
    pairs,
    heap,
    created,
    merges,
    merge_counts,
    num_known,
    num_merges,
    min_frequency,
    max_token_length,
    state,
):
    """Merge until `num_merges` are made, no pair is left, or the arrays are too small for the next merge.

    `merges` (int32, two ids a row) and `merge_counts` are outputs; the first `num_known` merges are given. Returns the new
    state, and the number of places of the pair that did not fit, or 0.
    """
    cells, weights = corpus.cells, corpus.weights
    lengths, begins, with_left, with_right = tokens.lengths, tokens.begins, tokens.with_left, tokens.with_right
    lefts, rights, counts, slices, places = pairs
    done, num_pairs, num_seen, heap_size, threshold = state
    while done < num_merges:
        merged = 256 + done
        if done < num_known:
            left, right = np.int64(merges[done, 0]), np.int64(merges[done, 1])
            pair = np.int64(_find(tokens, pairs, left, right))
        else:
            if heap_size == 0:
                highest = min_frequency - 1
                for candidate in range(num_pairs):
                    highest = max(highest, counts[candidate])
                if highest < min_frequency:
                    break
                threshold = max(min(threshold, highest) // _FALL, min_frequency)
                num_seen = 0
            for new in range(num_seen, num_pairs):
                if counts[new] >= threshold:
                    heap_size += 1
                    _sift(corpus, tokens, pairs, heap, heap_size - 1, heap_size, np.int32(new), counts[new])
            num_seen = num_pairs
            first, count = heap.pairs[0], counts[heap.pairs[0]]
            if count != heap.counts[0]:
                # Counts only fall, so an outdated count can be corrected when it reaches the top.
                if count < threshold:
                    heap_size -= 1
                    first, count = heap.pairs[heap_size], heap.counts[heap_size]
                _sift(corpus, tokens, pairs, heap, np.int64(0), heap_size, first, count)
                continue
            pair, left, right = np.int64(first), np.int64(lefts[first]), np.int64(rights[first])
        start, end = (slices[pair], slices[pair + 1]) if pair != NO_PAIR else (np.int64(0), np.int64(0))
        top = slices[num_pairs]
        most = 2 * (end - start)
        if num_pairs + min(most, 2 * merged + 2) >= len(counts) or top + most > len(places) or most > len(created.places):
            return State(done, num_pairs, num_seen, heap_size, threshold), end - start
        size_left, size_right = lengths[left], lengths[right]
        lengths[merged] = size_left + size_right
        if tokens.keys[merged] == 0:
            tokens.keys[merged] = tokens.keys[left]
            if size_left < 8:
                tokens.keys[merged] |= tokens.keys[right] >> np.uint64(8 * size_left)
        merges[done, 0], merges[done, 1] = left, right
        merge_counts[done] = counts[pair] if pair != NO_PAIR else 0
        num_created = 0
        first_new = num_pairs
        for at in range(start, end):
            _prefetch_places(corpus, tokens, pairs, pair, at, end)
            place = np.int64(places[at])
            if cells[place, PAIR] != pair:
                continue
            weight = weights[cells[place, PRETOKEN]]
            middle = place + size_left
            after = middle + size_right
            begins[merged] = place
            cells[place, TOKEN] = cells[after - 1, TOKEN] = merged
            cells[place, PAIR] = NO_PAIR
            if cells[middle, PAIR] != NO_PAIR:
                counts[cells[middle, PAIR]] -= weight
                cells[middle, PAIR] = NO_PAIR
            neighbour = np.int64(cells[place - 1, TOKEN])
            if neighbour != BLANK:
                before = place - lengths[neighbour]
                if cells[before, PAIR] != NO_PAIR:
                    counts[cells[before, PAIR]] -= weight
                    cells[before, PAIR] = NO_PAIR
                if lengths[neighbour] + lengths[merged] <= max_token_length:
                    new = np.int64(with_left[neighbour])
                    if new == NO_PAIR:
                        new = num_pairs
                        num_pairs += 1
                        lefts[new], rights[new], counts[new], slices[new + 1] = neighbour, merged, 0, 0
                        with_left[neighbour] = new
                    cells[before, PAIR] = new
                    counts[new] += weight
                    slices[new + 1] += 1
                    created.pairs[num_created], created.places[num_created] = new, before
                    num_created += 1
            neighbour = np.int64(cells[after, TOKEN])
            if neighbour != BLANK and lengths[neighbour] + lengths[merged] <= max_token_length:
                new = np.int64(with_right[neighbour])
                if new == NO_PAIR:
                    new = num_pairs
                    num_pairs += 1
                    lefts[new], rights[new], counts[new], slices[new + 1] = merged, neighbour, 0, 0
                    with_right[neighbour] = new
                cells[place, PAIR] = new
                counts[new] += weight
                slices[new + 1] += 1
                created.pairs[num_created], created.places[num_created] = new, place
                num_created += 1
        if pair != NO_PAIR:
            counts[pair] = 0
        # Turn sizes into starts. Writing the places then turns the start of each pair into its end, the start of the next.
        for new in range(first_new, num_pairs):
            top, slices[new + 1] = top + slices[new + 1], top
        for index in range(num_created):
            new = created.pairs[index]
            places[slices[new + 1]] = created.places[index]
            slices[new + 1] += 1
        for new in range(first_new, num_pairs):
            with_left[lefts[new]] = with_right[rights[new]] = NO_PAIR
        tokens.pairs_before[merged + 1] = num_pairs
        done += 1
    return State(done, num_pairs, num_seen, heap_size, threshold), 0
