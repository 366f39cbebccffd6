"""The keys of pretokens in the hash tables of the counter and the encoder: two words, and a hash of them.

The helpers are called by compiled functions in other files. The words are the bytes of a pretoken of at most `INLINE` bytes.
"""

import numpy as np

from .intrinsics import load8, load64
from .jit import helper, int64, uint64

INLINE = 16
_ALL = ~np.uint64(0)
_MASK = (1 << 64) - 1
_F0, _F1, _F2 = uint64(0x9E3779B97F4A7C15), uint64(0xC2B2AE3D27D4EB4F), uint64(0x165667B19E3779F9)
LOW_MASKS = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(INLINE + 1)], np.uint64)
HIGH_MASKS = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(INLINE + 1)], np.uint64)


@helper
def pretoken_key(data, start, size):
    """Return the two words of the key of `size` bytes: the bytes themselves up to 16, else a hash of them."""
    if size <= INLINE:
        if start + INLINE <= len(data):
            n = uint64(size)
            return load64(data, start) & LOW_MASKS[n], load64(data, start + 8) & HIGH_MASKS[n]
        low, high = uint64(0), uint64(0)
        for k in range(size):
            if k < 8:
                low |= uint64(load8(data, start + k)) << uint64(8 * k)
            else:
                high |= uint64(load8(data, start + k)) << uint64(8 * k - 64)
        return low, high
    low, high = load64(data, start), load64(data, start + size - 8)
    for k in range(8, size - 8, 8):
        low = (low ^ load64(data, start + k)) * _F0
        low ^= low >> uint64(32)
        high = (high + low) * _F1
    return low, high ^ (high >> uint64(29))


@helper
def pretoken_hash(low, high, size):
    """Return the hash of a pretoken from its key; the highest bits are the best distributed."""
    mixed = (low ^ (high * _F1) ^ (uint64(size) * _F2)) * _F0
    return mixed ^ (mixed >> uint64(32))


@helper
def keys_differ(low, high, size, other_low, other_high, other_size):
    """Compare two pretokens of equal hash by size, then by key; return a number below, at or above 0."""
    if size != other_size:
        return size - other_size
    if low != other_low:
        return int64(-1) if low < other_low else int64(1)
    if high != other_high:
        return int64(-1) if high < other_high else int64(1)
    return int64(0)


@helper
def compare_bytes(data, start, other, other_start, size):
    """Compare `size` bytes at two places; return a number below, at or above 0."""
    for k in range(size):
        difference = load8(data, start + k) - load8(other, other_start + k)
        if difference != 0:
            return difference
    return int64(0)


@helper
def equal_bytes(data, start, other, other_start, size):
    """Return whether the `size` bytes at the two places are equal."""
    k = 0
    while k + 8 <= size:
        if load64(data, start + k) != load64(other, other_start + k):
            return False
        k += 8
    return compare_bytes(data, start + k, other, other_start + k, size - k) == 0


def order_of(pretoken: bytes) -> tuple[int, int, int, int, bytes]:
    """Return the sort key of sorted counts, in plain Python: hash, size, the two words of the key, the bytes."""
    size = len(pretoken)
    low, high = _word(pretoken, 0), _word(pretoken, 8)
    if size > INLINE:
        high = _word(pretoken, size - 8)
        for k in range(8, size - 8, 8):
            low = (low ^ _word(pretoken, k)) * int(_F0) & _MASK
            low ^= low >> 32
            high = (high + low) * int(_F1) & _MASK
        high ^= high >> 29
    mixed = (low ^ high * int(_F1) ^ size * int(_F2)) * int(_F0) & _MASK
    return mixed ^ mixed >> 32, size, low, high, pretoken


def _word(pretoken: bytes, start: int) -> int:
    return int.from_bytes(pretoken[start : start + 8], "little")
