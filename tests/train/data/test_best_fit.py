from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train.data.best_fit import pack_best_fit


def reference_free_sizes(sizes, capacity):
    """Pack piece by piece with best-fit decreasing, and return the sorted free sizes of the bins."""
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, left in enumerate(free) if left >= size]
        if fitting:
            free[min(fitting, key=lambda number: free[number])] -= size
        else:
            free.append(capacity - size)
    return sorted(free)


@given(st.data(), st.integers(1, 40))
def test_equals_the_reference(data, capacity):
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=80)), np.int64)
    pieces, bounds = pack_best_fit(sizes, capacity)
    assert sorted(pieces.tolist()) == list(range(len(sizes)))
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    filled = [int(sizes[pieces[first:last]].sum()) for first, last in pairwise(bounds)]
    assert sorted(capacity - each for each in filled) == reference_free_sizes(sizes.tolist(), capacity)


def test_packing_is_stable():
    # A resumed run must read the windows that it began with.
    pieces, bounds = pack_best_fit(np.array([3, 5, 3, 2, 8, 1, 1, 5, 2]), 8)
    assert [pieces[first:last].tolist() for first, last in pairwise(bounds)] == GOLDEN


GOLDEN = [[4], [1, 0], [7, 2], [3, 8, 5, 6]]
