"""Hash tables of counts, their order, merging and files, compared with `collections.Counter`."""

import json
import random
import resource
import struct
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer.counting import counter as counter_module
from tilewright.tokenizer.counting import counts_file
from tilewright.tokenizer.counting import spill as spill_module
from tilewright.tokenizer.counting.counter import PretokenCounter
from tilewright.tokenizer.counting.counts_file import CountedText, load_counts, save_counts
from tilewright.tokenizer.counting.pretoken_counts import PretokenCounts, merge_counts
from tilewright.tokenizer.counting.spill import Spill
from tilewright.tokenizer.learning.learner import learn_merges

ONCE = np.ones(1, np.int64)
SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 32, 33, 100, 1000]

steady = settings(derandomize=True, deadline=None, max_examples=200)
pretokens = st.lists(st.binary(min_size=1, max_size=40) | st.text("ab", min_size=1, max_size=20).map(str.encode), max_size=60)


def count(pretokens, counts=ONCE, counter=None):
    counter = counter or PretokenCounter()
    ends = np.cumsum([len(pretoken) for pretoken in pretokens], dtype=np.int64)
    counter.add(np.frombuffer(b"".join(pretokens), np.uint8), 0, ends, counts)
    return counter


def some_pretokens(number, seed=0):
    draw = random.Random(seed)
    return [bytes(draw.choices(b"abc", k=draw.choice(SIZES))) for _ in range(number)]


def equal(first, second):
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("data", "ends", "counts"))


@pytest.mark.parametrize("number", [0, 1, 100, 50_000])
def test_counts_and_their_deterministic_order(number):
    found = some_pretokens(number)
    counts = count(found).counts()
    assert len(counts) == len(Counter(found))
    assert dict(counts.items()) == Counter(found)
    random.Random(1).shuffle(found)
    assert equal(counts, count(found).counts())


@steady
@given(first=pretokens, second=pretokens)
def test_merged_counts_equal_counts_of_all(first, second):
    merged = merge_counts(count(first).counts(), count(second).counts())
    assert equal(merged, count(first + second).counts())
    assert dict(merged.items()) == Counter(first + second)


def test_similar_pretokens_are_distinguished():
    # Long ones that differ only in places that a poor hash ignores, and short ones that are prefixes of each other.
    found = [b"a" * 40 + bytes([byte]) + b"b" * 40 for byte in range(256)] + [b"\0" * size for size in range(1, 60)]
    counts = count(found * 2).counts()
    assert dict(counts.items()) == dict.fromkeys(found, 2)
    assert equal(counts, count(found[::-1] * 2).counts())


def test_bytes_after_a_pretoken_are_ignored():
    for size in SIZES:
        word = b"x" * size
        data = np.frombuffer(word + b"y" + word + b"z" + word, np.uint8)
        counter = PretokenCounter()
        counter.add(data, 0, np.cumsum([size, 1, size, 1, size]), ONCE)
        assert dict(counter.counts().items()) == {word: 3, b"y": 1, b"z": 1}


def of_one_hash(number):
    """Return distinct pretokens of 16 bytes with equal hashes: see `pretoken_hash`."""
    highs = range(1, number + 1)
    lows = [(high * 0xC2B2AE3D27D4EB4F) % (1 << 64) for high in highs]
    return [struct.pack("<2Q", low, high) for low, high in zip(lows, highs, strict=True)]


def test_colliding_pretokens_are_counted():
    crafted = of_one_hash(1000)
    others = some_pretokens(5000)
    found = crafted * 2 + others + crafted[::-1]
    counter = count(found)
    assert len(counter._overflow) >= 1000 - counter_module._PLACES
    assert counter.num_bytes > 200 * len(counter._overflow)
    counts = counter.counts()
    assert dict(counts.items()) == Counter(found)
    # Other ones of them find a place in the table; the result is the same.
    assert equal(counts, count(found[::-1]).counts())
    assert equal(counts, merge_counts(count(crafted[::-1] * 3).counts(), count(others).counts()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"counts": np.array([3.0, 4.0])},
        {"ends": np.array([2.0, 4.0])},
        {"ends": np.array([2, 4], np.int32)},
        {"ends": np.array([2, 0, 4, 0])[::2]},
        {"ends": np.array([[2, 4]])},
        {"ends": [2, 4]},
        {"data": np.zeros(4, np.int8)},
    ],
)
def test_arrays_of_another_layout_raise(wrong):
    right = {"data": np.frombuffer(b"abab", np.uint8), "ends": np.array([2, 4]), "counts": np.array([3, 4])}
    assert PretokenCounts(**right).is_sound
    with pytest.raises(TypeError, match=next(iter(wrong))):
        PretokenCounts(**(right | wrong))
    if "data" not in wrong:
        with pytest.raises(TypeError):
            PretokenCounter().add(right["data"], 0, wrong.get("ends", right["ends"]), wrong.get("counts", right["counts"]))


def test_ends_and_counts_must_have_equal_lengths():
    with pytest.raises(ValueError, match="2 ends and 1 counts"):
        PretokenCounts(np.zeros(2, np.uint8), np.array([1, 2]), ONCE)


def test_counts_have_64_bits():
    counter = count([b"a", b"b"], np.array([1 << 40, 3]))
    count([b"a", b"a"], np.array([1 << 61]), counter)
    counts = counter.counts()
    assert dict(merge_counts(counts, count([b"b"]).counts()).items()) == {b"a": (1 << 62) + (1 << 40), b"b": 4}


def test_negative_ends_skip_special_tokens():
    counter = PretokenCounter()
    counter.add(np.frombuffer(b"ab<|>abc", np.uint8), 0, np.array([2, -5, 7, 8]), ONCE)
    assert dict(counter.counts().items()) == {b"ab": 2, b"c": 1}


def test_round_trip_of_a_mapping():
    mapping = {b"ab": 3, b"\xff": 1, b"c" * 50: 1 << 50}
    assert dict(PretokenCounts.of(mapping).items()) == mapping
    assert len(PretokenCounts.of({})) == 0


@pytest.mark.parametrize("runs", [1, 2, 7])
def test_merged_runs_equal_counts_of_all(monkeypatch, tmp_path, runs):
    monkeypatch.setattr(spill_module, "_BUFFER_BYTES", 500)
    monkeypatch.setattr(spill_module, "_BUFFER_PRETOKENS", 40)
    found = some_pretokens(2000)
    with Spill(tmp_path) as spill:
        for run in range(runs):
            spill.add(count(found[run::runs]).counts())
        assert len(spill) == runs
        merged = spill.merged()
    assert equal(merged, count(found).counts())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_spill_gives_no_counts(tmp_path):
    with Spill(tmp_path) as spill:
        spill.add(count([]).counts())
        assert len(spill.merged()) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_raises_and_leaves_no_files(tmp_path):
    counts = count(some_pretokens(20_000)).counts()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write counts to .*; free disk space"), Spill(tmp_path) as spill:
            spill.add(counts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def counted():
    return CountedText(count(some_pretokens(500)).counts(), "gpt2", ("<|endoftext|>", "é"), 12345)


def test_round_trip_of_a_counts_file(counted, tmp_path):
    save_counts(tmp_path / "counts", counted)
    loaded = load_counts(tmp_path / "counts")
    assert equal(loaded.counts, counted.counts)
    assert (loaded.pattern, loaded.special_tokens, loaded.text_bytes) == ("gpt2", ("<|endoftext|>", "é"), 12345)
    save_counts(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "counts").read_bytes()


def test_truncated_or_modified_counts_files_raise(counted, tmp_path):
    path = tmp_path / "counts"
    save_counts(path, counted)
    whole = path.read_bytes()
    for size in range(1, len(whole), 997):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is not a counts file|is truncated"):
            load_counts(path)
    for place in range(30, len(whole), 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"is not a counts file|was modified|has version"):
            load_counts(path)


def rewrite(path, header=None, body=None):
    """Modify a counts file and update its sha256."""
    line, _, rest = path.read_bytes().partition(b"\n")
    content = json.loads(line) | (header or {})
    content = {name: value for name, value in content.items() if name != "sha256" and value is not None}
    rest = rest if body is None else body
    content["sha256"] = counts_file._digest(content, [memoryview(rest)])
    path.write_bytes(json.dumps(content).encode() + b"\n" + rest)


@pytest.mark.parametrize(
    "header",
    [
        {"num_pretokens": None},
        {"num_pretokens": "1"},
        {"num_pretokens": -1},
        {"num_pretokens": 1},
        {"num_pretokens": 10**30},
        {"num_bytes": True},
        {"text_bytes": -1},
        {"special_tokens": "<a>"},
        {"special_tokens": [""]},
        {"special_tokens": [3]},
        {"pattern": None},
        {"pattern": 5},
        {"pattern": "gpt3"},
    ],
)
def test_inconsistent_counts_files_with_a_valid_digest_raise(tmp_path, header):
    path = tmp_path / "counts"
    save_counts(path, CountedText(PretokenCounts.of({b"abc": 2, b"de": 1}), "gpt2", (), 8))
    rewrite(path)
    assert dict(load_counts(path).counts.items()) == {b"abc": 2, b"de": 1}
    rewrite(path, header)
    with pytest.raises(UserError, match="is malformed"):
        load_counts(path)


@pytest.mark.parametrize(
    ("ends", "counts"), [([3, 1 << 28], [1, 1]), ([3, 2], [1, 1]), ([-1, 5], [1, 1]), ([3, 4], [1, 1]), ([3, 5], [1, 0])]
)
def test_inconsistent_counts_raise(tmp_path, ends, counts):
    wrong = PretokenCounts(np.frombuffer(b"abcde", np.uint8), np.array(ends), np.array(counts))
    with pytest.raises(ValueError, match="are inconsistent"):
        learn_merges(wrong, 3)
    save_counts(tmp_path / "counts", CountedText(wrong, "gpt2", (), 5))
    with pytest.raises(UserError, match="expected ascending ends"):
        load_counts(tmp_path / "counts")


@pytest.mark.parametrize("content", [b"[" * 100_000 + b"\n", b"GIF89a", b"[1]\n", b'{"format": "other"}\n', b"\xff\n"])
def test_other_files_raise(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(UserError, match="is not a counts file"):
        load_counts(tmp_path / "foreign")


def test_entries_wrap_around_at_the_end_of_a_table():
    # These have the highest of many hashes: in the smallest table, all belong into the last slots.
    highest = [word for word, _ in count([b"%d" % number for number in range(200_000)]).counts().items()][-60:]
    lowest = [b"%d" % number for number in range(900)]
    counts = count([*highest, *lowest] * 3).counts()
    assert dict(counts.items()) == dict.fromkeys([*lowest, *highest], 3)
    assert [word for word, _ in counts.items()][-60:] == highest
    assert equal(counts, count([*lowest, *highest[::-1]] * 3).counts())
