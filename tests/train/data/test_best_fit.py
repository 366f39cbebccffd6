from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train.data.best_fit import pack_best_fit


def rooms_one_by_one(sizes, room):
    """Best-fit-decreasing as it is defined, a piece at a time: the rooms that are left."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, left in enumerate(rooms) if left >= size]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= size
        else:
            rooms.append(room - size)
    return sorted(rooms)


@given(st.data(), st.integers(1, 40))
def test_whole_groups_are_placed_as_single_pieces_would_be(data, room):
    sizes = np.array(data.draw(st.lists(st.integers(1, room), max_size=80)), np.int64)
    pieces, bounds = pack_best_fit(sizes, room)
    assert sorted(pieces.tolist()) == list(range(len(sizes)))
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    filled = [int(sizes[pieces[first:last]].sum()) for first, last in pairwise(bounds)]
    assert sorted(room - each for each in filled) == rooms_one_by_one(sizes.tolist(), room)


def test_the_packing_stays_what_it_is():
    # A run that goes on must read the windows that it began with.
    pieces, bounds = pack_best_fit(np.array([3, 5, 3, 2, 8, 1, 1, 5, 2]), 8)
    assert [pieces[first:last].tolist() for first, last in pairwise(bounds)] == GOLDEN


GOLDEN = [[4], [1, 0], [7, 2], [3, 8, 5, 6]]
