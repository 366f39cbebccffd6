import json
import os
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.train.data.sampling import TrainingData, check_record
from tilewright.train.data.token_file import HEADER_BYTES, TokenDataset, TokenHeader, write_tokens


@pytest.fixture
def make_dataset(tmp_path):
    """Return a function make_dataset(num_tokens, first) that writes a dataset whose tokens count from `first`."""

    def make(num_tokens, first=0):
        path = tmp_path / f"{first}-{num_tokens}.tokens"
        write_tokens(path, [np.arange(first, first + num_tokens)], 100_000, "a tokenizer")
        return TokenDataset(path)

    return make


class Sized:
    """A dataset with a length but without tokens."""

    header = SimpleNamespace(marked=False)

    def __init__(self, num_tokens):
        self.num_tokens, self.path = num_tokens, num_tokens

    def __len__(self):
        return self.num_tokens


def starts_of(data, samples):
    files, starts = data._places(samples)
    return list(zip(files.tolist(), starts.tolist(), strict=True))


def test_targets_are_the_shifted_inputs(make_dataset):
    inputs, targets = TrainingData((make_dataset(1000),), 16, seed=0).batch(range(8))
    assert inputs.shape == targets.shape == (8, 16)
    assert inputs.dtype == targets.dtype == torch.long
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@given(st.integers(1, 40), st.integers(1, 500), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_epoch_samples_each_window_once(context_length, more, seed, epoch):
    data = TrainingData((Sized(context_length + more),), context_length, seed)
    (num_windows,) = data.num_windows
    places = starts_of(data, range(epoch * num_windows, (epoch + 1) * num_windows))
    starts = sorted(start for _, start in places)
    # Consecutive windows, so no token occurs twice.
    assert starts == list(range(starts[0], starts[0] + num_windows * context_length, context_length))
    assert starts[0] >= 0
    assert starts[-1] + context_length + 1 <= context_length + more
    assert context_length + more - num_windows * context_length < 2 * context_length


def test_every_token_is_sampled_eventually(make_dataset):
    data = TrainingData((make_dataset(100),), 16, seed=3)
    inputs, targets = data.batch(range(1000))
    assert set(inputs.flatten().tolist()) == set(range(99))
    assert set(targets.flatten().tolist()) == set(range(1, 100))
    offsets = Counter(min(start for _, start in starts_of(data, range(5 * k, 5 * k + 5))) for k in range(2000))
    assert set(offsets) == set(range(20))
    assert max(offsets.values()) < 2 * min(offsets.values())


def test_order_differs_between_epochs_and_seeds():
    orders = {}
    for seed in range(3):
        data = TrainingData((Sized(10_000),), 10, seed)
        (size,) = data.num_windows
        for epoch in range(3):
            places = starts_of(data, range(epoch * size, (epoch + 1) * size))
            orders[seed, epoch] = [start // 10 for _, start in places]
    for first in orders:
        for second in orders:
            same = sum(a == b for a, b in zip(orders[first], orders[second], strict=True))
            assert same == len(orders[first]) if first == second else same < 10


@settings(deadline=None)
@given(
    st.lists(st.integers(11, 5000), min_size=1, max_size=5),
    st.lists(st.integers(0, 20_000), min_size=1, max_size=6),
    st.booleans(),
)
def test_samples_do_not_depend_on_the_batch(lengths, cuts, weighted):
    datasets = tuple(map(Sized, lengths))
    data = TrainingData(datasets, 10, 7, tuple(range(1, len(lengths) + 1)) if weighted else None)
    cuts = sorted({0, *cuts})
    whole = starts_of(data, range(cuts[-1]))
    assert whole == [place for first, last in pairwise(cuts) for place in starts_of(data, range(first, last))]
    for sample in cuts[:-1]:
        assert data.place(sample) == (datasets[whole[sample][0]].path, whole[sample][1])


def test_samples_may_be_strided(make_dataset):
    data = TrainingData((make_dataset(1000), make_dataset(300, first=2000)), 16, seed=0)
    whole = data.batch(range(64))[0]
    assert torch.equal(data.batch(range(1, 64, 2))[0], whole[1::2])
    assert data.batch(range(5, 5))[0].shape == (0, 16)


WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


@given(WEIGHTS, st.integers(0, 2**40), st.integers(1, 2000))
def test_counts_of_files_match_their_shares_at_any_time(weights, first, count):
    data = TrainingData((Sized(100),) * len(weights), 10, 0, tuple(weights))
    shares = np.array(weights) / sum(weights)
    # The number of samples of each file among the first n, with the arithmetic of `_places`.
    whole = first + count
    left, total = whole, []
    for share in data._shares:
        total.append(left * share >> 32)
        left -= total[-1]
    assert sum(total) == whole
    assert np.all(np.abs(np.array(total) - shares * whole) <= len(weights) + whole * 2.0**-30)
    files = Counter(file for file, _ in starts_of(data, range(first, whole)))
    for file, share in enumerate(shares):
        assert abs(files[file] - share * count) <= 2 * len(weights) + whole * 2.0**-29


def test_default_weights_sample_all_windows_equally():
    datasets = tuple(map(Sized, (1011, 411, 111, 20_011)))
    data = TrainingData(datasets, 10, 0)
    total = sum(data.num_windows)
    counts = Counter(starts_of(data, range(total)))
    per_file = Counter(file for file, _ in counts.elements())
    for file, num_windows in enumerate(data.num_windows):
        assert abs(per_file[file] - num_windows) <= len(datasets)
    # A file may begin its next epoch a sample early, so a window may occur twice.
    assert max(counts.values()) <= 2


def test_small_share_is_evenly_spaced():
    data = TrainingData((Sized(1000), Sized(1000)), 10, 0, (999.0, 1.0))
    where = [sample for sample, (file, _) in enumerate(starts_of(data, range(10_000))) if file == 1]
    assert len(where) == 10
    assert set(np.diff(where)) <= {999, 1000, 1001}


def test_large_files_and_sample_indices():
    # 2^40 tokens, and samples beyond 2^32.
    data = TrainingData((Sized(2**40), Sized(2**33)), 1024, 1, (0.75, 0.25))
    places = starts_of(data, range(2**34, 2**34 + 4000))
    for file, limit in ((0, 2**40), (1, 2**33)):
        starts = [start for which, start in places if which == file]
        assert max(starts) > 0.99 * limit
        assert max(starts) + 1025 <= limit
        assert min(starts) < 0.01 * limit
    assert sum(file == 0 for file, _ in places) == 3000


def test_windows_beyond_four_gigabytes(tmp_path):
    path, num_tokens = tmp_path / "large.tokens", 2**32
    with path.open("wb") as file:
        file.write(json.dumps(TokenHeader("uint16", num_tokens, "", 50_000, "").__dict__).encode().ljust(HEADER_BYTES))
        file.truncate(HEADER_BYTES + 2 * num_tokens)
    data = TrainingData((TokenDataset(path),), 64, seed=0)
    sample = next(sample for sample in range(100) if data.place(sample)[1] > 2**31)
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 2 * data.place(sample)[1])
        file.write(np.arange(65, dtype="<u2").tobytes())
    data = TrainingData((TokenDataset(path),), 64, seed=0)
    assert data.batch(range(sample, sample + 1))[1].tolist() == [list(range(1, 65))]


def test_order_is_stable():
    # A run that resumes with another version of this package or of NumPy must read the same samples.
    one = TrainingData((Sized(1000),), 16, 0)
    assert starts_of(one, range(6)) == GOLDEN["one"]
    assert starts_of(one, range(10_000, 10_003)) == GOLDEN["later"]
    mixed = TrainingData((Sized(1000), Sized(500), Sized(10**12)), 16, 2**62, (1.0, 2.5, 0.1))
    assert starts_of(mixed, range(2**40, 2**40 + 6)) == GOLDEN["mixed"]
    assert starts_of(TrainingData((Sized(1000), Sized(500)), 16, 1), range(6)) == GOLDEN["unweighted"]


GOLDEN = {
    "one": [(0, 949), (0, 21), (0, 629), (0, 325), (0, 917), (0, 101)],
    "later": [(0, 572), (0, 652), (0, 524)],
    "mixed": [(2, 321366238268), (1, 364), (1, 92), (0, 330), (1, 140), (1, 252)],
    "unweighted": [(1, 4), (0, 313), (0, 617), (1, 228), (0, 601), (0, 441)],
}


def test_file_shorter_than_a_window_is_rejected(make_dataset):
    TrainingData((make_dataset(17),), 16, 0)
    with pytest.raises(UserError, match=r"16.tokens has 16 tokens: at least 16 \+ 1 are needed"):
        TrainingData((make_dataset(1000), make_dataset(16)), 16, 0)


class TestRecord:
    @pytest.fixture
    def datasets(self, make_dataset):
        return make_dataset(100), make_dataset(200, first=300)

    @pytest.fixture
    def stored(self, datasets):
        return json.loads(json.dumps(TrainingData(datasets, 16, 0).record()))

    def reopened(self, datasets):
        return TrainingData(tuple(TokenDataset(data.path) for data in datasets), 16, 0)

    def test_unchanged_files_are_not_read(self, datasets, stored, monkeypatch):
        monkeypatch.setattr(TokenDataset, "verify", None)
        check_record(stored, self.reopened(datasets))

    def test_files_may_move(self, datasets, stored, tmp_path):
        paths = [data.path.rename(tmp_path / f"moved {i}.tokens") for i, data in enumerate(datasets)]
        check_record(stored, TrainingData(tuple(map(TokenDataset, paths)), 16, 0))

    def test_a_copy_is_verified_and_accepted(self, datasets, stored):
        for data in datasets:
            content = data.path.read_bytes()
            data.path.unlink()
            data.path.write_bytes(content)
            os.utime(data.path, ns=(0, 0))
        check_record(stored, self.reopened(datasets))

    def test_changed_ids_with_the_same_header_are_detected(self, datasets, stored):
        content = bytearray(datasets[1].path.read_bytes())
        content[-5] ^= 1
        datasets[1].path.write_bytes(content)
        os.utime(datasets[1].path, ns=(0, 0))
        with pytest.raises(UserError, match=r"300-200.tokens has changed: "):
            check_record(stored, self.reopened(datasets))

    @pytest.mark.parametrize(
        ("ids", "vocab_size", "tokenizer", "what"),
        [
            (np.arange(100)[::-1], 100_000, "a tokenizer", "ids"),
            (np.arange(101), 100_000, "a tokenizer", "ids"),
            (np.arange(100), 90_000, "a tokenizer", "vocabulary"),
            (np.arange(100), 100_000, "another", "tokenizer"),
        ],
    )
    def test_another_file_is_rejected(self, datasets, stored, ids, vocab_size, tokenizer, what):
        write_tokens(datasets[0].path, [ids], vocab_size, tokenizer)
        with pytest.raises(UserError, match=rf"0-100.tokens is not the file that the run began with: it has another {what}"):
            check_record(stored, self.reopened(datasets))

    def test_another_number_or_order_of_files_is_rejected(self, datasets, stored):
        with pytest.raises(UserError, match="began with 2 training files, not 1"):
            check_record(stored, self.reopened(datasets[:1]))
        with pytest.raises(UserError, match=r"300-200.tokens is not the file"):
            check_record(stored, self.reopened(datasets[::-1]))

    def test_another_order_of_samples_is_rejected(self, datasets, stored):
        with pytest.raises(UserError, match="samples its data in order 2: this version supports 1"):
            check_record({**stored, "order": 2}, self.reopened(datasets))

    @pytest.mark.parametrize("broken", [{}, [], None, {"order": 1, "files": [3]}, {"order": 1, "files": [{"header": {}}]}])
    def test_an_invalid_record_is_rejected(self, datasets, broken):
        with pytest.raises(UserError, match="cannot read the run's record of its data"):
            check_record(broken, self.reopened(datasets))
