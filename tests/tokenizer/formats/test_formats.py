import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.tokenizer.formats import (
    TokenizerData,
    fingerprint,
    from_printable,
    load_tokenizer,
    save_tokenizer,
    to_printable,
)
from tilewright.tokenizer.formats.tokenizer_data import content_of, digest
from tilewright.tokenizer.text import unicode_classes
from tilewright.tokenizer.text.patterns import PATTERNS
from tilewright.tokenizer.text.unicode_classes import UPPER, classes_by_regex

BYTES = {id: bytes([id]) for id in range(256)}


@pytest.fixture
def saved(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    return path


def test_a_saved_tokenizer_comes_back(tokenizer, saved):
    loaded = Tokenizer.load(saved)
    assert loaded.vocab == tokenizer.vocab
    assert loaded.merges == tokenizer.merges
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.fingerprint == tokenizer.fingerprint == json.loads(saved.read_bytes())["sha256"]


def test_special_tokens_come_back_whatever_they_hold(tmp_path):
    specials = ["<|fin|>", "### Frage:", "終\n🙂", "Ġ"]
    tokenizer = Tokenizer(BYTES, [], specials)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.encode("".join(specials)) == [256, 257, 258, 259]


def test_equal_tokenizers_give_equal_files(tokenizer, saved, tmp_path):
    backwards = dict(reversed(tokenizer.vocab.items()))
    Tokenizer(backwards, tokenizer.merges, list(tokenizer.special_tokens)).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_the_order_special_tokens_are_given_in_does_not_count():
    vocab = BYTES | {256: b"<a>", 257: b"<b>"}
    assert Tokenizer(vocab, [], ["<a>", "<b>"]).fingerprint == Tokenizer(vocab, [], ["<b>", "<a>"]).fingerprint


def test_the_fingerprint_covers_everything(tokenizer):
    vocab, merges = tokenizer.vocab, tokenizer.merges
    fingerprints = {
        tokenizer.fingerprint,
        Tokenizer(vocab, merges).fingerprint,
        Tokenizer(vocab, merges, ["<|endoftext|>", "<|pad|>"]).fingerprint,
        Tokenizer(vocab, merges[:-1], ["<|endoftext|>"]).fingerprint,
        Tokenizer(vocab, merges[::-1], ["<|endoftext|>"]).fingerprint,
        Tokenizer(vocab | {0: vocab[1], 1: vocab[0]}, merges, ["<|endoftext|>"]).fingerprint,
    }
    assert len(fingerprints) == 6


@pytest.mark.parametrize(("pattern", "covered"), [("gpt2", False), ("deepseek-v3", False), (r"\w+|\W", True)])
def test_the_fingerprint_of_a_pattern_that_regex_splits_covers_its_unicode(monkeypatch, tmp_path, tokenizer, pattern, covered):
    data = tokenizer.data._replace(pattern=pattern)
    save_tokenizer(tmp_path / "tokenizer.json", data)
    before, classes = fingerprint(data), classes_by_regex()
    classes[0xA7D2] ^= UPPER
    monkeypatch.setattr(unicode_classes, "classes_by_regex", lambda: classes)
    assert (fingerprint(load_tokenizer(tmp_path / "tokenizer.json")) != before) is covered


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W"])
def test_the_pattern_and_the_figures_of_the_training_are_kept(tokenizer, tmp_path, pattern):
    path = tmp_path / "tokenizer.json"
    data = tokenizer.data._replace(pattern=pattern, training={"bytes": 1000, "ties": "cs336"})
    save_tokenizer(path, data)
    assert load_tokenizer(path) == data
    loaded = Tokenizer.load(path)
    assert loaded.pattern == pattern
    assert loaded.encode("It's 12345 o'clock!\n") == Tokenizer.of(data).encode("It's 12345 o'clock!\n")
    # They are no part of what a tokenizer is.
    assert loaded.fingerprint == fingerprint(data) == fingerprint(data._replace(training=None))
    assert (loaded.fingerprint == tokenizer.fingerprint) == (pattern == "gpt2")


def test_ids_may_have_gaps(tmp_path):
    data = TokenizerData(BYTES | {258: b"ab", 300: b"<|end|>"}, [(b"a", b"b")], {"<|end|>": 300})
    save_tokenizer(tmp_path / "tokenizer.json", data)
    assert load_tokenizer(tmp_path / "tokenizer.json") == data
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode("abc<|end|>") == [258, ord("c"), 300]
    assert loaded.decode([258, 300]) == "ab<|end|>"
    with pytest.raises(UserError, match="id 257 is not in the vocabulary"):
        loaded.decode([257])


def test_a_file_cut_off_anywhere_is_refused(saved):
    whole = saved.read_bytes()
    for size in range(0, len(whole) - 2, 997):
        saved.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is empty" if size == 0 else "cut off|not UTF-8"):
            Tokenizer.load(saved)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"Q"', b'"R"', "changed after it was written"),
        (b'"version": 2', b'"version": 1', "version 1: only 2 is known"),
        (b"tilewright-tokenizer", b"other", "another format"),
        (b'"sha256": "', b'"sha256": "0', "changed after it was written"),
        (b'"pattern": "', b'"pattern": ".|', "changed after it was written"),
        (b'"merges"', b'"merged"', "changed after it was written"),
        (b'"Q"', b'"\xff"', "not UTF-8"),
    ],
)
def test_a_changed_file_is_refused(saved, old, new, message):
    whole = saved.read_bytes()
    assert whole.count(old) >= 1
    saved.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(saved)


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "an object is needed"), ("{}", "another format"), ("GIF89a", "not JSON")]
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    (tmp_path / "foreign.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "foreign.json")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(UserError, match="is not JSON, or is cut off"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="is not JSON, or is cut off"):
        Tokenizer.from_files(tmp_path / "tokenizer.json", tmp_path / "merges.txt")


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": None},
        {"merges": [5]},
        {"vocab": None},
        {"vocab": [1, 2]},
        {"special_tokens": None},
        {"special_tokens": {"<|endoftext|>": 5}},
        {"special_tokens": {"<new>": 3}},
        {"special_tokens": {"\ud800": 3}},
        {"pattern": 5},
        {"pattern": None},
        {"pattern": "gpt3"},
        {"training": [1]},
    ],
)
def test_a_whole_file_may_still_be_wrong(saved, changes):
    document = json.loads(saved.read_text()) | changes
    document["sha256"] = digest({name: document[name] for name in ("pattern", "special_tokens", "vocab", "merges")})
    saved.write_text(json.dumps(document))
    with pytest.raises(UserError, match=re.escape(str(saved))):
        Tokenizer.load(saved)


def test_ids_have_an_end():
    with pytest.raises(UserError, match="has the id 4294967296: ids go from 0 to 16777215"):
        Tokenizer(BYTES | {1 << 32: b"ab"}, [(b"a", b"b")])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "none.json")


@settings(derandomize=True, deadline=None)
@given(data=st.binary())
def test_every_byte_has_one_printable_character(data):
    text = to_printable(data)
    assert len(text) == len(data)
    assert text.isprintable()
    assert " " not in text
    assert from_printable(text) == data


def test_the_alphabet_is_gpt2s():
    assert to_printable(" café\n\x00\xad".encode()) == "ĠcafÃ©ĊĀÂŃ"


def write_gpt2_files(folder, tokenizer, specials):
    vocab = {
        (token.decode() if token.decode(errors="ignore") in specials else to_printable(token)): id
        for id, token in tokenizer.vocab.items()
    }
    merges = [f"{to_printable(left)} {to_printable(right)}" for left, right in tokenizer.merges]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def test_gpt2_files_are_read(tokenizer, tmp_path, real_text):
    specials = ["<|endoftext|>"]
    loaded = Tokenizer.from_files(*write_gpt2_files(tmp_path, tokenizer, specials), special_tokens=specials)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(real_text) == tokenizer.encode(real_text)


def test_special_tokens_stand_as_plain_text_in_gpt2_files(tmp_path):
    specials = ["<| fin |>", "終"]
    tokenizer = Tokenizer(BYTES | {256: b"# #", 257: b"##"}, [(b"#", b"#")], specials)
    loaded = Tokenizer.from_files(*write_gpt2_files(tmp_path, tokenizer, specials), specials)
    assert loaded.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ('{"a": 1, "b": 1}', "a b", "'b' the id 1"),
        ('{"a": "1"}', "a b", "'a' the id '1'"),
        ('{"a b": 1}', "a b", "' ', which is not in GPT-2's byte alphabet"),
        ('{"a": 0}', "#version: 0.2\nab\n", "merge 'ab'"),
        ('{"a": 0}', "a b c", "merge 'a b c'"),
        ('{"a": 0}', "a \x01", "not in GPT-2's byte alphabet"),
        ('{"a": 0}', "a b", "lacks the byte"),
    ],
)
def test_malformed_gpt2_files_are_named(tmp_path, vocab, merges, message):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_a_pattern_has_its_name_in_a_fingerprint_only_if_it_always_had():
    # Tokenizers were made with the expressions of others before these had names.
    expected = [name if name in ("gpt2", "cl100k", "o200k") else PATTERNS[name] for name in PATTERNS]
    assert [content_of(TokenizerData(BYTES, [], {}, name))["pattern"] for name in PATTERNS] == expected
    # What was stored in runs and token files when there were three names.
    data = TokenizerData(BYTES | {256: b"ab", 257: b"<|end|>"}, [(b"a", b"b")], {"<|end|>": 257})
    assert fingerprint(data) == "cb93309ab8f37270444d5aeed7689e7da6deeffc38067a0cbb125d6b795f498a"
