import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tilewright.errors import UserError
from tilewright.train.data.token_file import HEADER_BYTES, FileStamp, TokenDataset, TokenHeader, TokenWriter, write_tokens


@pytest.fixture
def dataset(tmp_path):
    """The numbers 0 .. 999 as tokens."""
    write_tokens(tmp_path / "count.tokens", [np.arange(400), np.arange(400, 1000)], 1000, "a fingerprint")
    return TokenDataset(tmp_path / "count.tokens")


def test_format_of_a_token_file(dataset):
    with dataset.path.open("rb") as file:
        header = json.loads(file.readline())
        ids = file.read()
    assert header == {
        "format": "tilewright-tokens-2",
        "dtype": "uint16",
        "num_tokens": 1000,
        "sha256": hashlib.sha256(ids).hexdigest(),
        "vocab_size": 1000,
        "tokenizer": "a fingerprint",
        "text_bytes": 0,
        "text_sha256": "",
        "text_file": None,
    }
    assert ids == np.arange(1000, dtype="<u2").tobytes()
    assert dataset.path.stat().st_size == HEADER_BYTES + 2 * 1000
    assert len(dataset) == 1000


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_never_overflow(tmp_path, vocab_size, dtype):
    header = write_tokens(tmp_path / "a.tokens", [np.array([0, vocab_size - 1])], vocab_size)
    assert header.dtype == dtype
    windows = TokenDataset(tmp_path / "a.tokens").windows(np.array([0]), 2)
    assert windows.tolist() == [[0, vocab_size - 1]]
    for wrong in (vocab_size, -1, 2**40):
        with pytest.raises(UserError, match=f"token {wrong} is outside the vocabulary of {vocab_size}"):
            write_tokens(tmp_path / "b.tokens", [np.array([0, wrong, 1])], vocab_size)
    assert not (tmp_path / "b.tokens").exists()


@given(
    st.lists(arrays.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 70_000)), min_size=1, max_size=5),
    st.data(),
)
def test_windows_are_slices_of_the_ids(tmp_path_factory, pieces, data):
    path = tmp_path_factory.mktemp("tokens") / "a.tokens"
    write_tokens(path, pieces, data.draw(st.sampled_from([70_001, 2**20])))
    ids, dataset = np.concatenate(pieces), TokenDataset(path)
    assert len(dataset) == len(ids)
    length = data.draw(st.integers(0, len(ids)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(ids) - length), max_size=5)), np.int64)
    windows = dataset.windows(starts, length)
    assert windows.dtype == np.int64
    assert windows.shape == (len(starts), length)
    assert all((row == ids[start : start + length]).all() for row, start in zip(windows, starts, strict=True))
    with pytest.raises(ValueError, match="do not fit"):
        dataset.windows(np.array([len(ids) - length + 1]), length)


def test_interrupted_write_leaves_no_file(tmp_path):
    def ids():
        yield np.arange(10)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_tokens(tmp_path / "a.tokens", ids(), 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50_000, "<u2"), (100_000, "<u4")])
def test_files_larger_than_four_gigabytes(tmp_path, vocab_size, dtype):
    # A sparse file, which needs little disk space.
    path, num_tokens, size = tmp_path / "large.tokens", 2**32 + 12_345, np.dtype(dtype).itemsize
    header = TokenHeader(np.dtype(dtype).name, num_tokens, "", vocab_size, "")
    places = [0, 2**31 - 3, 2**31 + 7, 2**32 - 5, num_tokens - 10]
    with path.open("wb") as file:
        file.write(json.dumps(header.__dict__).encode().ljust(HEADER_BYTES))
        for place in places:
            file.seek(HEADER_BYTES + place * size)
            file.write(((np.arange(10) + place) % vocab_size).astype(dtype).tobytes())
    assert path.stat().st_size > 2**33
    dataset = TokenDataset(path)
    assert len(dataset) == num_tokens
    windows = dataset.windows(np.array(places), 10)
    assert (windows == (np.arange(10) + np.array(places)[:, None]) % vocab_size).all()
    assert not dataset.windows(np.array([2**31 + 100, 2**32 + 100]), 1000).any()


def test_invalid_token_files_are_rejected(dataset, tmp_path):
    whole = dataset.path.read_bytes()
    broken = tmp_path / "broken.tokens"
    for content, message in {
        b"some text": "is not a token file",
        b"[]": "is not a token file",
        b"\xff" * 5000: "is not a token file",
        whole.replace(b"tokens-2", b"tokens-1"): "of another version, tilewright-tokens-1; remove it to encode it again",
        whole.replace(b"uint16", b"uint32"): "is not a token file",
        whole.replace(b"uint16", b"int999"): "is not a token file",
        whole.replace(b'"num_tokens": 1000', b'"num_tokens": null'): "is not a token file",
        whole.replace(b'"num_tokens": 1000', b'"num_tokens": -100'): "is not a token file",
        whole[:-2]: r"has 6094 bytes: expected 6096 by its header",
        whole + b"\0": r"has 6097 bytes: expected 6096 by its header",
    }.items():
        broken.write_bytes(content)
        with pytest.raises(UserError, match=message):
            TokenDataset(broken)


def test_ids_outside_the_vocabulary_are_rejected(dataset):
    ids = np.arange(1000, dtype="<u2")
    ids[7] = 1000
    path = dataset.path.with_name("damaged.tokens")
    path.write_bytes(dataset.path.read_bytes()[:HEADER_BYTES] + ids.tobytes())
    damaged = TokenDataset(path)
    assert damaged.windows(np.array([8]), 4).tolist() == [[8, 9, 10, 11]]
    with pytest.raises(UserError, match=r"damaged.tokens holds token 1000, outside its vocabulary of 1000"):
        damaged.windows(np.array([4]), 4)


def cut_off(path):
    os.truncate(path, path.stat().st_size - 1000)


def cut_to_nothing(path):
    os.truncate(path, 0)


def edit(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    let_time_pass(path)


def replace(path):
    other = path.with_name("other.tokens")
    write_tokens(other, [np.arange(1000)[::-1]], 1000)
    other.replace(path)
    let_time_pass(path)


def let_time_pass(path):
    # The test may be faster than the resolution of the file system's clock.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**7))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (os.unlink, r"cannot read token file .*count.tokens: No such file or directory"),
        (cut_off, "count.tokens has 5096 bytes: expected 6096"),
        (cut_to_nothing, "count.tokens has 0 bytes: expected 6096"),
        (edit, "count.tokens has changed: the hash of its ids differs"),
        (replace, "count.tokens has changed: the hash of its ids differs"),
    ],
)
def test_change_of_an_open_dataset_is_detected(dataset, harm, message):
    dataset.windows(np.array([0]), 10)
    harm(dataset.path)
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            dataset.windows(np.array([0]), 10)


def test_touched_or_copied_file_is_accepted(dataset, monkeypatch):
    dataset.windows(np.array([0]), 10)
    os.utime(dataset.path, ns=(1, 1))
    assert dataset.windows(np.array([0]), 3).tolist() == [[0, 1, 2]]
    copy = dataset.path.with_name("copy")
    copy.write_bytes(dataset.path.read_bytes())
    copy.replace(dataset.path)
    assert dataset.windows(np.array([0]), 3).tolist() == [[0, 1, 2]]
    # The file is hashed once, not at each read.
    monkeypatch.setattr(TokenDataset, "_verify", None)
    assert dataset.windows(np.array([0]), 3).tolist() == [[0, 1, 2]]


class TestResuming:
    def test_writer_resumes_after_the_last_save(self, tmp_path):
        path = tmp_path / "part"
        with path.open("w+b") as file:
            writer = TokenWriter(file, 1000, "t")
            writer.append(np.arange(300))
            header = writer.save(7, "of the text", FileStamp("a.txt", 7, 8))
            writer.append(np.arange(5))
        with path.open("r+b") as file:
            writer = TokenWriter(file, 1000, "t", header)
            writer.append(np.arange(300, 1000))
            resumed = writer.save(9, "")
        whole = write_tokens(tmp_path / "whole", [np.arange(1000)], 1000, "t")
        assert resumed == dataclasses.replace(whole, text_bytes=9)
        assert path.read_bytes()[HEADER_BYTES:] == (tmp_path / "whole").read_bytes()[HEADER_BYTES:]

    def test_lost_or_changed_ids_are_rejected(self, tmp_path):
        path = tmp_path / "part"
        with path.open("w+b") as file:
            writer = TokenWriter(file, 1000, "t")
            writer.append(np.arange(300))
            header = writer.save()
        whole = path.read_bytes()
        for content in (whole[:-1], whole[:-1] + b"\2", b""):
            path.write_bytes(content)
            with path.open("r+b") as file, pytest.raises(ValueError, match="differs from its header"):
                TokenWriter(file, 1000, "t", header)
