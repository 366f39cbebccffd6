"""Best-fit-decreasing bin packing of millions of pieces (Ding et al. 2024, "Fewer Truncations Improve Language Modeling")."""

from bisect import bisect_left, insort

import numpy as np


def pack_best_fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into as few bins as best-fit-decreasing needs: each, the largest first, in the fullest bin with room for it.

    `sizes` (n,) are integers from 1 to `room`. Returns the numbers of the pieces, (n,) int64, bin by bin, and where in them
    each bin begins, with n at the end, (bins + 1,) int64. Pieces of one size keep their order.

    Pieces of one size are alike, and so are bins with as much room left, so that whole groups are placed at once: time is
    that of a sort, and of a few array operations for each group.
    """
    order = np.argsort(-sizes.astype(np.int64), kind="stable")
    bin_of = np.empty(len(sizes), np.int64)
    # By the room that is left: bins as arrays, in the order in which they came to it, and the rooms themselves, ascending.
    open_bins: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []
    num_bins = 0

    def leave(bins: np.ndarray, left: int) -> None:
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(bins)

    found, counts = np.unique(sizes, return_counts=True)
    first = 0
    for size, count in zip(found[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces = order[first : first + count]
        first += count
        while len(pieces):
            place = bisect_left(rooms, size)
            if place < len(rooms):
                left = rooms.pop(place)
                groups = open_bins.pop(left)
                bins = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                left, each = room, room // size
                bins = np.arange(num_bins, num_bins - (-len(pieces) // each))
                num_bins += len(bins)
            # The fullest bin with room takes a piece, and is then fuller still: it goes on until it has no room for another.
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
