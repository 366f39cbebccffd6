import dataclasses
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.train import train
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.data.packing import PackedWindows, Packing, packed_windows
from tilewright.train.data.sampling import TrainingData, check_record
from tilewright.train.data.token_file import TokenDataset, write_tokens
from tilewright.train.metrics import read_metrics

END = 0
PACKING = Packing("best_fit", END)


def write_documents(path, sizes, ends_whole=True):
    """Write documents of the sizes with distinct tokens, counted from 1. Without `ends_whole` the last one has no end token."""
    ids = np.arange(1, sum(sizes) + 1)
    ids[np.cumsum(sizes) - 1] = END
    if not ends_whole:
        ids[-1] = sum(sizes)
    write_tokens(path, [ids], 100_000, "by")
    return TokenDataset(path), ids


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 16), st.booleans())
def test_pieces_are_whole_documents_or_full_windows(tmp_path_factory, sizes, context_length, ends_whole):
    dataset, ids = write_documents(tmp_path_factory.mktemp("text") / "a.tokens", [3, *sizes], ends_whole or sizes[-1] == 1)
    windows = PackedWindows(dataset, context_length, PACKING)
    borders = [0, *(np.flatnonzero(ids == END) + 1).tolist()]
    borders += [len(ids)] if borders[-1] < len(ids) else []
    documents = list(pairwise(borders))
    pieces = sorted(piece for number in range(len(windows)) for piece in windows.pieces(number))
    length, stride = context_length + 1, context_length
    # Consecutive pieces of a document share a token, which is the first input of the second piece.
    expected = []
    for first, last in documents:
        starts = range(first, max(first + 1, last - 1), stride) if last - first > length else [first]
        expected += [(start, min(length, last - start)) for start in starts]
    assert pieces == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 16))
def test_inputs_targets_and_documents_match_the_pieces(tmp_path_factory, sizes, context_length):
    dataset, ids = write_documents(tmp_path_factory.mktemp("text") / "a.tokens", sizes)
    begins = {0, *(np.flatnonzero(ids == END) + 1).tolist()}
    windows = PackedWindows(dataset, context_length, PACKING)
    inputs, targets, documents = windows.read(np.arange(len(windows)))
    assert (inputs.dtype, targets.dtype, documents.dtype) == (torch.int64, torch.int64, torch.int32)
    for row in range(len(windows)):
        tokens, scored, document = [], [], []
        for number, (start, size) in enumerate(windows.pieces(row)):
            tokens += ids[start : start + size].tolist()
            scored += [start in begins] + [True] * (size - 1)
            document += [number] * size
        missing = context_length + 1 - len(tokens)
        assert missing >= 0
        document += [len(windows.pieces(row))] * missing
        scored += [False] * missing
        tokens += [0] * missing
        assert inputs[row].tolist() == tokens[:-1]
        assert targets[row].tolist() == [token if counts else -100 for token, counts in zip(tokens, scored, strict=True)][1:]
        assert (documents[row] - documents[row, 0]).tolist() == document[:-1]


def test_every_token_except_window_starts_is_a_target_once_per_epoch(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 60, 300).tolist()
    dataset, ids = write_documents(tmp_path / "a.tokens", sizes)
    data = TrainingData((dataset,), 16, 0, packing=PACKING)
    (windows,) = data.packed
    _, targets, _ = data.batch(range(len(windows)))
    counts = Counter(targets[targets > 0].tolist())
    assert set(counts.values()) == {1}
    starts = {windows.pieces(number)[0][0] for number in range(len(windows))}
    # The first token of a window is a target only if its piece continues the document of another window.
    assert {int(id) for place, id in enumerate(ids) if id and place not in starts} <= set(counts)


def test_best_fit_fills_windows_better_than_file_order(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 60, 500).tolist()
    dataset, _ = write_documents(tmp_path / "a.tokens", sizes)
    best, in_order = (PackedWindows(dataset, 99, Packing(method, END)) for method in ("best_fit", "none"))
    assert len(best) == -(-sum(sizes) // 100) < 0.9 * len(in_order)
    assert best.summary().endswith(f"500 documents in {len(best)} windows of 100 tokens, 99.8% filled")


def test_text_is_packed_only_with_best_fit(tmp_path):
    dataset, _ = write_documents(tmp_path / "a.tokens", [5, 9])
    assert packed_windows(dataset, 8, Packing(end_of_text=END)) is None
    assert packed_windows(dataset, 8, PACKING) is not None
    write_tokens(tmp_path / "b.tokens", [np.arange(1, 50)], 100_000, "by")
    with pytest.raises(UserError, match=r"b.tokens has no end-of-text token: data.packing must be none"):
        packed_windows(TokenDataset(tmp_path / "b.tokens"), 8, PACKING)


def test_epoch_has_each_window_once_and_sampling_is_deterministic(tmp_path):
    sizes = np.random.default_rng(1).integers(1, 30, 100).tolist()
    datasets = tuple(write_documents(tmp_path / f"{name}.tokens", sizes[:cut])[0] for name, cut in (("a", 100), ("b", 40)))
    data = TrainingData(datasets, 16, 1, packing=PACKING)
    total = sum(data.num_windows)
    firsts = [(windows.dataset.path, windows.pieces(n)[0][0]) for windows in data.packed for n in range(len(windows))]
    assert sorted(data.place(sample) for sample in range(total)) == sorted(firsts)
    again = TrainingData(datasets, 16, 1, packing=PACKING)
    assert all(torch.equal(a, b) for a, b in zip(again.batch(range(3, 9)), data.batch(range(3, 9)), strict=True))
    check_record(json.loads(json.dumps(data.record())), again)


def test_packed_run_resumes_exactly(changed, config, capsys):
    packed = changed(data=dataclasses.replace(config.data, packing="best_fit"))
    result = train(packed)
    assert "documents in" in capsys.readouterr().err
    assert result.valid_loss < 6.0
    whole = read_metrics(config.out)
    train(packed, resume=list_checkpoints(config.out)[-2])
    names = ("step", "loss", "valid_loss", "valid_bits_per_byte")
    found, expected = ([[row.get(name) for name in names] for row in rows] for rows in (read_metrics(config.out), whole))
    assert found == expected
