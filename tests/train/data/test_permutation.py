import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train.data.permutation import make_keys, mix, permute

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 3000), KEYS)
def test_permute_is_a_permutation(size, key):
    images = permute(np.arange(size), size, np.array([key], np.uint64))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(size))


@given(st.integers(1, 2**63), st.lists(KEYS, min_size=1, max_size=20), st.data())
def test_images_of_large_ranges_are_in_range_and_distinct(size, keys, data):
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=len(keys), max_size=len(keys), unique=size >= len(keys)))
    keys = np.array(keys, np.uint64)
    images = permute(np.array(values, np.uint64), size, keys)
    assert all(0 <= image < size for image in images.tolist())
    # The images do not depend on the batch.
    assert images.tolist() == [
        permute(np.array([value], np.uint64), size, key.reshape(1)).item() for value, key in zip(values, keys, strict=True)
    ]
    one_key = permute(np.array(values, np.uint64), size, keys[:1])
    assert len(set(one_key.tolist())) == len(set(values))


def test_empty_input():
    assert permute(np.array([], np.int64), 5, make_keys(0)).tolist() == []


def test_pairs_of_images_are_uniform():
    size, num_keys = 33, 200_000
    keys = make_keys(5, np.arange(num_keys))
    first, second = (permute(np.full(num_keys, value), size, keys) for value in (0, 1))
    counts = np.bincount(first * size + second, minlength=size**2).reshape(size, size)
    assert not counts.diagonal().any()
    expected = num_keys / (size * (size - 1))
    squares = ((counts - expected) ** 2 / expected)[~np.eye(size, dtype=bool)].sum()
    freedom = size * (size - 1) - 1
    # Within five standard deviations of the mean of a chi-squared sum.
    assert abs(squares - freedom) < 5 * (2 * freedom) ** 0.5


def test_steps_between_images_are_uniform():
    size = 100_000
    steps = np.diff(permute(np.arange(size), size, make_keys(1))) % size
    counts = np.bincount(steps // 1000, minlength=100)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_keys_depend_on_all_parts_and_their_order():
    keys = [make_keys(*parts).item() for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63 - 1,), (2**63,)]]
    assert len(set(keys)) == len(keys)
    assert make_keys(3, np.arange(4)).tolist() == [make_keys(3, i).item() for i in range(4)]


def test_mix_equals_splitmix64():
    # The first outputs of the authors' program for seed 0.
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_permutations_are_stable():
    assert permute(np.arange(10), 10, make_keys(0)).tolist() == GOLDEN[10]
    assert permute(np.arange(8), 10**9, make_keys(1, 2, 3)).tolist() == GOLDEN[10**9]
    assert permute(np.arange(3), 2**63, make_keys(2**63)).tolist() == GOLDEN[2**63]


GOLDEN = {
    10: [6, 5, 0, 1, 7, 4, 9, 8, 2, 3],
    10**9: [607672167, 410761475, 62875556, 291491234, 175460194, 896262052, 535424429, 538171105],
    2**63: [374872571250229108, 7398345786690306011, 4032617961292909397],
}
