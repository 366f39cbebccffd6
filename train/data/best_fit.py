"""Best-fit-decreasing bin packing of millions of pieces (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""

from bisect import bisect_left, insort

import numpy as np


def pack_best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into bins by best-fit decreasing: each piece, largest first, goes into the fullest bin that can hold it.

    `sizes` (n,) are integers from 1 to `capacity`. Returns the indices of the pieces in the order of the bins, (n,) int64, and
    the offset of each bin in them, (bins + 1,) int64; the last offset is n. Pieces of equal size keep their order.

    Pieces of equal size are interchangeable, and so are bins with equal free capacity. The algorithm therefore places whole
    groups at once: it costs one sort and a few array operations per group.
    """
    order = np.argsort(-sizes.astype(np.int64), kind="stable")
    bin_of = np.empty(len(sizes), np.int64)
    # Open bins by free capacity, as arrays in the order of arrival, and the free capacities in ascending order.
    open_bins: dict[int, list[np.ndarray]] = {}
    sizes_left: list[int] = []
    num_bins = 0

    def leave(bins: np.ndarray, left: int) -> None:
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(sizes_left, left)
            open_bins[left].append(bins)

    found, counts = np.unique(sizes, return_counts=True)
    first = 0
    for size, count in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces = order[first : first + count]
        first += count
        while len(pieces):
            place = bisect_left(sizes_left, size)
            if place < len(sizes_left):
                left = sizes_left.pop(place)
                groups = open_bins.pop(left)
                bins = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                left, each = capacity, capacity // size
                bins = np.arange(num_bins, num_bins - (-len(pieces) // each))
                num_bins += len(bins)
            # After a piece, the fullest bin is still the fullest: it takes pieces until the next one does not fit.
            each = left // size
            full, rest = divmod(len(pieces), each)
            if full < len(bins):
                taken = np.repeat(bins[: full + (rest > 0)], each)[: len(pieces)]
                if rest:
                    leave(bins[full : full + 1], left - rest * size)
                leave(bins[full + (rest > 0) :], left)
                leave(bins[:full], left - each * size)
            else:
                taken = np.repeat(bins, each)
                leave(bins, left - each * size)
            bin_of[pieces[: len(taken)]] = taken
            pieces = pieces[len(taken) :]
    by_bin = order[np.argsort(bin_of[order], kind="stable")]
    return by_bin, np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
