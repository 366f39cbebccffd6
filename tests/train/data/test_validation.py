import numpy as np
import pytest
import torch

from tilewright.train.data.packing import PackedWindows, Packing
from tilewright.train.data.token_file import TokenDataset, write_tokens
from tilewright.train.data.validation import ValidationData


@pytest.fixture
def dataset(tmp_path):
    """The numbers 0 .. 999 as tokens."""
    write_tokens(tmp_path / "count.tokens", [np.arange(1000)], 1000)
    return TokenDataset(tmp_path / "count.tokens")


def test_windows_are_evenly_spaced_and_deterministic(dataset):
    batches = list(ValidationData(dataset, num_sequences=10, context_length=16).batches(4))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert starts.tolist() == [0, 109, 218, 327, 436, 546, 655, 764, 873, 983]
    assert (starts.diff() >= 16).all()
    again = ValidationData(dataset, 10, 16).batches(4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_short_file_is_read_once(dataset):
    batches = ValidationData(dataset, num_sequences=400, context_length=100).batches(4)
    assert sum(len(inputs) for inputs, _ in batches) == 9


def test_validation_packs_as_training_does(tmp_path):
    ids = np.concatenate([[*range(1, size), 0] for size in (5, 3, 9, 2, 7, 4, 4)])
    write_tokens(tmp_path / "a.tokens", [ids], 1000)
    dataset, packing = TokenDataset(tmp_path / "a.tokens"), Packing("best_fit", 0)
    (batch,) = ValidationData(dataset, 100, 8, packing).batches(100)
    windows = PackedWindows(dataset, 8, packing)
    expected = windows.read(np.arange(len(windows)))
    assert all(torch.equal(found, wanted) for found, wanted in zip(batch, expected, strict=True))
