"""Seeded permutations of any size in constant memory, independent of the NumPy version.

A permutation is a generalized Feistel network over a domain slightly larger than the range, with cycle walking (Black & Rogaway
2002, "Ciphers with Arbitrary Finite Domains", sections 4 and 5). Round function and keys use the finalizer of SplitMix64
(Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators").
"""

from math import isqrt

import numpy as np

# The fewest rounds for which the images of pairs pass a chi-squared test of uniformity, for sizes from 9 to 513.
_ROUNDS = 8
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """Apply a pseudorandom bijection to uint64 `values` of any shape."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def make_keys(*parts: int | np.ndarray) -> np.ndarray:
    """Return uint64 keys, (n,) or (1,), that depend on all `parts` in order: non-negative integers, or arrays (n,) of them."""
    keys = np.zeros(1, np.uint64)
    for part in parts:
        keys = mix((keys + _GAMMA) ^ mix(np.asarray(part, np.uint64).reshape(-1) + _GAMMA))
    return keys


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return the image of each value under the permutation of range(size) that its key selects, (n,) int64.

    `values` (n,) are integers in range(size), `size` is at most 2^63, and `keys` are (n,) or (1,) uint64.
    """
    images = np.asarray(values, np.uint64)
    keys = np.broadcast_to(keys, images.shape)
    images = _feistel(images, size, keys)
    while len(outside := np.flatnonzero(images >= np.uint64(size))):
        images[outside] = _feistel(images[outside], size, keys[outside])
    return images.astype(np.int64)


def _feistel(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    # The domain is at most one row larger than the range, so that few values fall outside the range.
    height = np.uint64(isqrt(size - 1) + 1)
    width = np.uint64(-(-size // int(height)))
    row, column = np.divmod(values, width)
    for round in range(0, _ROUNDS, 2):
        row = (row + _noise(column, round, keys) % height) % height
        column = (column + _noise(row, round + 1, keys) % width) % width
    return row * width + column


def _noise(half: np.ndarray, round: int, keys: np.ndarray) -> np.ndarray:
    # A half is below 2^32, because it is at most the square root of 2^63, rounded up.
    return mix(keys + (half | np.uint64(round << 32)) * _GAMMA)
