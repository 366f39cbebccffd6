"""Counts of distinct pretokens, sorted by hash, so that two of them merge like sorted lists, in memory or from disk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..compiled.intrinsics import copy_bytes
from ..compiled.jit import BYTES, INT64, INT64S, NUMBERS, UINT8S, check_array, compiled, int64
from ..compiled.pretoken_keys import INLINE, compare_bytes, keys_differ, order_of, pretoken_hash, pretoken_key


@dataclass(frozen=True, eq=False)
class PretokenCounts:
    """Distinct pretokens and their numbers of occurrences.

    Pretoken i is `data[ends[i - 1]:ends[i]]` (from 0 for the first) and occurs `counts[i]` times. `data` is uint8, `ends` and
    `counts` are int64 of shape (n,). Results of this package are sorted by hash, so equal counts have equal arrays.
    """

    data: np.ndarray
    ends: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        # Compiled code does not check types.
        for name, kind in (("data", np.uint8), ("ends", np.int64), ("counts", np.int64)):
            check_array(getattr(self, name), kind, name)
        if len(self.ends) != len(self.counts):
            raise ValueError(f"there are {len(self.ends)} ends and {len(self.counts)} counts: expected equal numbers")

    @property
    def is_sound(self) -> bool:
        """Whether the ends ascend from 0 to the end of `data`, and all counts are positive."""
        ends = self.ends
        last = int(ends[-1]) if len(ends) else 0
        return last == len(self.data) and bool(
            np.all(ends[:1] >= 0) and np.all(ends[1:] >= ends[:-1]) and np.all(self.counts > 0)
        )

    @classmethod
    def of(cls, counts: Mapping[bytes, int]) -> "PretokenCounts":
        """Return the counts of a mapping, in its order."""
        data = np.frombuffer(b"".join(counts), np.uint8)
        ends = np.cumsum(np.fromiter(map(len, counts), np.int64, len(counts)), dtype=np.int64)
        return cls(data, ends, np.fromiter(counts.values(), np.int64, len(counts)))

    def __len__(self) -> int:
        return len(self.ends)

    def items(self) -> Iterator[tuple[bytes, int]]:
        """Yield (pretoken, count)."""
        data, start = self.data.tobytes(), 0
        for end, count in zip(self.ends.tolist(), self.counts.tolist(), strict=True):
            yield data[start:end], count
            start = end


def sorted_by_hash(counts: Mapping[bytes, int]) -> PretokenCounts:
    """Return the counts sorted by hash."""
    return PretokenCounts.of({each: counts[each] for each in sorted(counts, key=order_of)})


def merge_counts(first: PretokenCounts, second: PretokenCounts) -> PretokenCounts:
    """Return the sum of two counts that are sorted by hash, sorted by hash."""
    merged = PretokenCounts(
        np.empty(len(first.data) + len(second.data), np.uint8),
        np.empty(len(first) + len(second), np.int64),
        np.empty(len(first) + len(second), np.int64),
    )
    _, _, size, used = merge_step(first, second, 0, 0, merged)
    return PretokenCounts(merged.data[:used], merged.ends[:size], merged.counts[:size])


def merge_step(
    first: PretokenCounts, second: PretokenCounts, i: int, j: int, merged: PretokenCounts
) -> tuple[int, int, int, int]:
    """Merge from index i of the first and j of the second on, until both end or `merged` is full.

    Returns the new i and j, and the numbers of pretokens and bytes in `merged`; its `ends` start from 0.
    """
    arrays = (first.data, first.ends, first.counts, second.data, second.ends, second.counts)
    i, j, size, used = _merge(*arrays, i, j, merged.data, merged.ends, merged.counts)
    return i, j, size, int(used)


@compiled(BYTES, NUMBERS, NUMBERS, BYTES, NUMBERS, NUMBERS, INT64, INT64, UINT8S, INT64S, INT64S)
def _merge(data, ends, counts, other_data, other_ends, other_counts, i, j, merged_data, merged_ends, merged_counts):
    n, used = 0, 0
    while n < len(merged_ends) and (i < len(ends) or j < len(other_ends)):
        order = int64(0)
        start, size, other_start, other_size = int64(0), int64(0), int64(0), int64(0)
        if i < len(ends):
            start = ends[i - 1] if i else int64(0)
            size = ends[i] - start
        else:
            order = int64(1)
        if j < len(other_ends):
            other_start = other_ends[j - 1] if j else int64(0)
            other_size = other_ends[j] - other_start
        else:
            order = int64(-1)
        if order == 0:
            low, high = pretoken_key(data, start, size)
            other_low, other_high = pretoken_key(other_data, other_start, other_size)
            hashed, other_hashed = pretoken_hash(low, high, size), pretoken_hash(other_low, other_high, other_size)
            if hashed != other_hashed:
                order = int64(-1) if hashed < other_hashed else int64(1)
            else:
                order = keys_differ(low, high, size, other_low, other_high, other_size)
                if order == 0 and size > INLINE:
                    order = compare_bytes(data, start, other_data, other_start, size)
        if used + (size if order <= 0 else other_size) > len(merged_data):
            break
        if order <= 0:
            copy_bytes(merged_data, used, data, start, size)
            used += size
        else:
            copy_bytes(merged_data, used, other_data, other_start, other_size)
            used += other_size
        count = int64(0)
        if order <= 0:
            count += counts[i]
            i += 1
        if order >= 0:
            count += other_counts[j]
            j += 1
        merged_ends[n], merged_counts[n] = used, count
        n += 1
    return i, j, n, used
