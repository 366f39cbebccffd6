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


def test_round_trip(tokenizer, saved):
    loaded = Tokenizer.load(saved)
    assert loaded.vocab == tokenizer.vocab
    assert loaded.merges == tokenizer.merges
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.fingerprint == tokenizer.fingerprint == json.loads(saved.read_bytes())["sha256"]


def test_round_trip_of_any_special_tokens(tmp_path):
    specials = ["<|fin|>", "### Frage:", "終\n🙂", "Ġ"]
    tokenizer = Tokenizer(BYTES, [], specials)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.encode("".join(specials)) == [256, 257, 258, 259]


def test_equal_tokenizers_give_identical_files(tokenizer, saved, tmp_path):
    backwards = dict(reversed(tokenizer.vocab.items()))
    Tokenizer(backwards, tokenizer.merges, list(tokenizer.special_tokens)).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_files_are_independent_of_the_order_of_special_tokens():
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
def test_the_fingerprint_of_a_custom_pattern_covers_the_unicode_version(monkeypatch, tmp_path, tokenizer, pattern, covered):
    data = tokenizer.data._replace(pattern=pattern)
    save_tokenizer(tmp_path / "tokenizer.json", data)
    before, classes = fingerprint(data), classes_by_regex()
    classes[0xA7D2] ^= UPPER
    monkeypatch.setattr(unicode_classes, "classes_by_regex", lambda: classes)
    assert (fingerprint(load_tokenizer(tmp_path / "tokenizer.json")) != before) is covered


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W"])
def test_the_pattern_and_the_training_figures_are_stored(tokenizer, tmp_path, pattern):
    path = tmp_path / "tokenizer.json"
    data = tokenizer.data._replace(pattern=pattern, training={"bytes": 1000, "ties": "cs336"})
    save_tokenizer(path, data)
    assert load_tokenizer(path) == data
    loaded = Tokenizer.load(path)
    assert loaded.pattern == pattern
    assert loaded.encode("It's 12345 o'clock!\n") == Tokenizer.of(data).encode("It's 12345 o'clock!\n")
    # The figures are not part of a tokenizer's identity.
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


def test_truncated_files_raise(saved):
    whole = saved.read_bytes()
    for size in range(0, len(whole) - 2, 997):
        saved.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is empty" if size == 0 else "cut off|not UTF-8"):
            Tokenizer.load(saved)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"Q"', b'"R"', "modified after it was written"),
        (b'"version": 2', b'"version": 1', "version 1: expected 2"),
        (b"tilewright-tokenizer", b"other", "an unknown format"),
        (b'"sha256": "', b'"sha256": "0', "modified after it was written"),
        (b'"pattern": "', b'"pattern": ".|', "modified after it was written"),
        (b'"merges"', b'"merged"', "modified after it was written"),
        (b'"Q"', b'"\xff"', "not UTF-8"),
    ],
)
def test_modified_files_raise(saved, old, new, message):
    whole = saved.read_bytes()
    assert whole.count(old) >= 1
    saved.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(saved)


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "expected an object"), ("{}", "an unknown format"), ("GIF89a", "not JSON")]
)
def test_files_of_unknown_formats_raise(tmp_path, content, message):
    (tmp_path / "foreign.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "foreign.json")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_parse_raises(tmp_path, content):
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
def test_inconsistent_files_with_a_valid_digest_raise(saved, changes):
    document = json.loads(saved.read_text()) | changes
    document["sha256"] = digest({name: document[name] for name in ("pattern", "special_tokens", "vocab", "merges")})
    saved.write_text(json.dumps(document))
    with pytest.raises(UserError, match=re.escape(str(saved))):
        Tokenizer.load(saved)


def test_too_large_ids_raise():
    with pytest.raises(UserError, match="has the id 4294967296: expected an id from 0 to 16777215"):
        Tokenizer(BYTES | {1 << 32: b"ab"}, [(b"a", b"b")])


def test_missing_files_raise(tmp_path):
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


def test_the_alphabet_equals_gpt2s():
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


def test_special_tokens_are_plain_text_in_gpt2_files(tmp_path):
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
def test_malformed_gpt2_files_raise(tmp_path, vocab, merges, message):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_fingerprints_store_only_the_original_names_of_patterns():
    # Tokenizers were trained with these expressions before the patterns had names.
    expected = [name if name in ("gpt2", "cl100k", "o200k") else PATTERNS[name] for name in PATTERNS]
    assert [content_of(TokenizerData(BYTES, [], {}, name))["pattern"] for name in PATTERNS] == expected
    # The fingerprints in runs and token files from when three patterns had names.
    data = TokenizerData(BYTES | {256: b"ab", 257: b"<|end|>"}, [(b"a", b"b")], {"<|end|>": 257})
    assert fingerprint(data) == "cb93309ab8f37270444d5aeed7689e7da6deeffc38067a0cbb125d6b795f498a"
