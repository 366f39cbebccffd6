import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.train import train
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.data.datasets import open_dataset
from tilewright.train.data.sampling import TrainingData, check_record
from tilewright.train.data.shards import INDEX_FILE, ShardedDataset, find_shards, write_index
from tilewright.train.data.token_file import HEADER_BYTES, TokenDataset, write_tokens
from tilewright.train.metrics import read_metrics


def write_shards(folder, sizes, tokenizer="by", vocab_size=100_000):
    """Write token files of the sizes with tokens counted from 0 across the files. Return them as one dataset."""
    folder.mkdir(exist_ok=True)
    paths, first = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number:03}.tokens")
        write_tokens(paths[-1], [np.arange(first, first + size)], vocab_size, tokenizer)
        first += size
    return ShardedDataset(folder, [TokenDataset(path) for path in paths])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_spans_may_cross_shards(tmp_path_factory, sizes, data):
    dataset = write_shards(tmp_path_factory.mktemp("shards"), [5, *sizes])
    total = 5 + sum(sizes)
    assert len(dataset) == dataset.header.num_tokens == total
    starts = np.array(data.draw(st.lists(st.integers(0, total - 1), max_size=6)), np.int64)
    ends = np.array([data.draw(st.integers(start, total)) for start in starts.tolist()], np.int64)
    found = dataset.spans(starts, ends - starts)
    assert found.tolist() == [id for start, end in zip(starts, ends, strict=True) for id in range(start, end)]
    with pytest.raises(ValueError, match="do not fit"):
        dataset.windows(np.array([total - 2]), 3)


def test_windows_equal_those_of_one_file(tmp_path):
    dataset = write_shards(tmp_path / "shards", [40, 1, 300, 0, 77])
    write_tokens(tmp_path / "whole.tokens", [np.arange(418)], 100_000, "by")
    whole = TrainingData((TokenDataset(tmp_path / "whole.tokens"),), 16, 3)
    shards = TrainingData((dataset,), 16, 3)
    for found, expected in zip(shards.batch(range(200)), whole.batch(range(200)), strict=True):
        assert torch.equal(found, expected)


def test_counts_of_sharded_sources_match_their_shares(tmp_path):
    datasets = (write_shards(tmp_path / "a", [200, 100]), write_shards(tmp_path / "b", [50, 60, 70]))
    data = TrainingData(datasets, 16, 0, (3.0, 1.0))
    assert Counter(data.sources(range(400)).tolist()) == {0: 300, 1: 100}
    assert Counter(data.sources(range(7, 47)).tolist())[1] in range(9, 12)


def test_incompatible_shards_are_rejected(tmp_path):
    first, other = write_shards(tmp_path / "a", [9]), write_shards(tmp_path / "b", [9], "another")
    with pytest.raises(UserError, match=r"b/000.tokens has another tokenizer than .*a/000.tokens; name them as two sources"):
        ShardedDataset(tmp_path, [*first.files, *other.files])
    other = write_shards(tmp_path / "c", [9], vocab_size=50)
    with pytest.raises(UserError, match=r"c/000.tokens has another vocabulary"):
        ShardedDataset(tmp_path, [*first.files, *other.files])


def test_shards_are_found_by_folder_index_and_glob(tmp_path):
    dataset = write_shards(tmp_path / "a", [9, 9, 9])
    paths = [shard.path for shard in dataset.files]
    assert find_shards(tmp_path / "a") == find_shards(tmp_path / "a" / "*.tokens") == paths
    assert find_shards(paths[0]) is None
    # An index lists the shards in order.
    write_index(tmp_path / "a", dataset.files[:0:-1])
    for path in (tmp_path / "a", tmp_path / "a" / INDEX_FILE):
        assert find_shards(path) == [paths[2], paths[1]]
    with pytest.raises(UserError, match=r"a/\* matches token files and .*index.json; name token files only, such as"):
        find_shards(tmp_path / "a" / "*")
    paths[1].unlink()
    with pytest.raises(UserError, match=r"token file of .*index.json, .*001.tokens does not exist: encode its text again"):
        find_shards(tmp_path / "a")


def test_folder_of_texts_and_token_files_is_rejected(tmp_path):
    write_shards(tmp_path / "a", [9])
    (tmp_path / "a" / "tokenizer.json").touch()
    (tmp_path / "a" / "train.txt").touch()
    with pytest.raises(
        UserError, match=r"a has token files and train.txt; name files of one kind, such as '.*a/\*.tokens' or '.*a/\*.txt'"
    ):
        find_shards(tmp_path / "a")
    (tmp_path / "a" / "train.txt").unlink()
    assert find_shards(tmp_path / "a") == [tmp_path / "a" / "000.tokens"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": "x", "shards": []}', '{"format": "tilewright-token-shards-1", "shards": []}']
)
def test_invalid_index_is_rejected(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match=r"index.json is (empty|not an index of token shards)"):
        find_shards(tmp_path)


def test_index_with_files_of_another_folder_is_rejected(tmp_path):
    write_index(tmp_path, write_shards(tmp_path, [9]).files)
    (tmp_path / INDEX_FILE).write_text((tmp_path / INDEX_FILE).read_text().replace("000.tokens", "../000.tokens"))
    with pytest.raises(UserError, match="lists no file, or a file of another folder"):
        find_shards(tmp_path)


def test_shard_that_differs_from_its_index_is_rejected(tmp_path, corpus):
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    write_index(tmp_path, write_shards(tmp_path, [9, 9], tokenizer.fingerprint, 300).files)
    open_dataset(tmp_path, tokenizer).verify()
    write_tokens(tmp_path / "001.tokens", [np.arange(9)], 300, tokenizer.fingerprint)
    with pytest.raises(UserError, match=r"001.tokens is not the shard listed in .*index.json"):
        open_dataset(tmp_path, tokenizer)


def test_remote_shards_are_fetched_and_read(tmp_path, corpus, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    dataset = write_shards(tmp_path / "a", [9, 20], tokenizer.fingerprint, 300)
    for shard in dataset.files:
        fsspec.filesystem("memory").pipe(f"/shards/{shard.path.name}", shard.path.read_bytes())
    remote = open_dataset(Path("memory://shards/*.tokens"), tokenizer)
    assert remote.header == dataset.header
    assert [shard.path.name for shard in remote.files] == ["000.tokens", "001.tokens"]


def change_a_byte(path):
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 4)
        file.write(b"\x01")


def test_changed_shard_is_detected(tmp_path):
    dataset = write_shards(tmp_path / "a", [9, 9])
    dataset.verify()
    stored = json.loads(json.dumps(TrainingData((dataset,), 4, 0).record()))
    change_a_byte(tmp_path / "a" / "001.tokens")
    with pytest.raises(UserError, match=r"001.tokens has changed: "):
        dataset.verify()
    again = ShardedDataset(tmp_path / "a", [TokenDataset(shard.path) for shard in dataset.files])
    with pytest.raises(UserError, match=r"001.tokens has changed: "):
        check_record(stored, TrainingData((again,), 4, 0))


def test_record_lists_each_shard(tmp_path, monkeypatch):
    dataset = write_shards(tmp_path / "a", [9, 10, 11])
    stored = json.loads(json.dumps(TrainingData((dataset,), 4, 0).record()))
    shards = dataset.files
    os.utime(shards[1].path, ns=(0, 0))
    read = []
    monkeypatch.setattr(TokenDataset, "verify", lambda shard: read.append(shard.path))
    reopened = [TokenDataset(shard.path) for shard in shards]
    check_record(stored, TrainingData((ShardedDataset(tmp_path / "a", reopened),), 4, 0))
    # The other two have the recorded size and time.
    assert read == [shards[1].path]
    with pytest.raises(UserError, match=r"began with 3 shards of .*a, not 2"):
        check_record(stored, TrainingData((ShardedDataset(tmp_path / "a", shards[:2]),), 4, 0))
    with pytest.raises(UserError, match=r"001.tokens is not the file that the run began with: it has another ids"):
        check_record(stored, TrainingData((ShardedDataset(tmp_path / "a", [shards[1], shards[0], shards[2]]),), 4, 0))


def test_run_on_a_folder_of_texts_resumes_exactly(config, corpus, tmp_path):
    documents = (corpus / "train.txt").read_text().split("<|endoftext|>")
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for number, name in enumerate(("a.txt", "b.txt", "more/a.txt")):
        (tmp_path / "texts" / name).write_text("<|endoftext|>".join(documents[number::3]))
    data = dataclasses.replace(config.data, train=(tmp_path / "texts", corpus / "valid.txt"), weights=(3.0, 1.0))
    config = dataclasses.replace(config, data=data, steps=6, checkpoint_every=2)
    train(config)
    assert find_shards(tmp_path / "texts.tokens") == [
        tmp_path / "texts.tokens" / f"{name}.tokens" for name in ("a.txt", "b.txt", "more-a.txt")
    ]
    whole = read_metrics(config.out)
    # Resume with the shards themselves, which are the same source.
    for path in (tmp_path / "texts.tokens", tmp_path / "texts.tokens" / "*.tokens"):
        again = dataclasses.replace(config, data=dataclasses.replace(data, train=(path, corpus / "valid.tokens")))
        train(again, resume=list_checkpoints(config.out)[-2])
        losses = [[(row["step"], row["loss"]) for row in rows] for rows in (read_metrics(config.out), whole)]
        assert losses[0] == losses[1]
