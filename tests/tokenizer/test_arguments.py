"""Arguments of wrong types, and arguments of decoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer, train_bpe
from tilewright.tokenizer.text.patterns import PATTERNS

BYTES = {id: bytes([id]) for id in range(256)}
SPECIALS = ["<a>", "<b>"]


@pytest.fixture(scope="module")
def small():
    return Tokenizer(BYTES, [], SPECIALS)


@pytest.mark.parametrize("wrong", [None, b"a", 5, ["a"]])
@pytest.mark.parametrize("method", ["encode", "encode_array", "encode_with_offsets"])
def test_texts_must_be_strings(small, method, wrong):
    with pytest.raises(TypeError, match=f"text is of type {type(wrong).__name__}: expected str"):
        getattr(small, method)(wrong)


def test_a_batch_must_not_be_a_string(small):
    with pytest.raises(TypeError, match="texts is 'the cat': expected an iterable of strings"):
        small.encode_batch("the cat")
    with pytest.raises(TypeError, match="text is of type bytes: expected str"):
        small.encode_batch(["a", b"b"])


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
@pytest.mark.parametrize("method", ["encode", "encode_array", "encode_batch", "encode_with_offsets", "encode_iterable"])
def test_a_choice_of_special_tokens_must_not_be_a_string(small, method, argument):
    with pytest.raises(TypeError, match=f"{argument} is '<a>': expected 'all' or a collection of strings"):
        list(getattr(small, method)(["x"] if method in ("encode_batch", "encode_iterable") else "x", **{argument: "<a>"}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"<a>"}, "special_tokens is the set {'<a>'}, which has no order: expected a list or a tuple"),
        (frozenset({"<a>"}), "which has no order"),
        ("<a>", "special_tokens is the string '<a>'"),
        ([b"<a>"], "special_tokens has b'<a>' at 0: expected a str"),
        (["<a>", 5], "special_tokens has 5 at 1: expected a str"),
    ],
)
def test_special_tokens_must_be_a_sequence_of_strings(text_file, wrong, message):
    with pytest.raises(TypeError, match=message):
        Tokenizer(BYTES, [], wrong)
    with pytest.raises(TypeError, match=message):
        train_bpe(text_file("text"), 300, wrong)


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (None, [], "vocab is None: expected a mapping"),
        ([b"a"], [], "vocab is .*: expected a mapping"),
        (BYTES | {256: "ab"}, [], "256 to 'ab': expected an integer and bytes"),
        ({token: id for id, token in BYTES.items()}, [], "to 0: expected an integer and bytes"),
        (BYTES | {256.0: b"ab"}, [], "vocab maps 256.0"),
        (BYTES, None, "merges is None: expected an iterable"),
        (BYTES, "ab", "merges is 'ab': expected an iterable"),
        (BYTES, ["ab"], "merges has 'ab' at 0: expected a pair of tokens"),
        (BYTES, {(b"a", b"b")}, "merges is a set of 1, which has no order"),
        (BYTES, iter([(97, 98)]), r"merges has \(97, 98\) at 0: expected a pair of tokens"),
        (BYTES | {256: b"ab"}, [(b"a", b"b"), (b"ab", b"a", b"b")], "at 1: expected a pair of tokens"),
    ],
)
def test_ids_must_be_integers_and_tokens_bytes(vocab, merges, message):
    with pytest.raises(TypeError, match=message):
        Tokenizer(vocab, merges)


def test_numpy_ids_and_lists_of_pairs_are_accepted():
    given = Tokenizer({np.uint8(id): token for id, token in BYTES.items()}, [], SPECIALS)
    assert given.fingerprint == Tokenizer(BYTES, [], SPECIALS).fingerprint
    tokenizer = Tokenizer(BYTES | {np.int64(256): b"ab"}, [[b"a", b"b"]])
    assert tokenizer.encode("ab") == [256]
    assert {type(id) for id in tokenizer.vocab} == {int}
    assert tokenizer.merges == [(b"a", b"b")]


@pytest.mark.parametrize("nothing", [[], (), iter([]), np.array([]), np.array([], np.uint16)])
def test_empty_ids_decode_to_empty_text(small, nothing):
    assert small.decode(nothing) == ""
    assert small.decode_bytes(np.array([])) == b""
    assert small.decode_batch([np.array([])]) == [""]
    assert small.decode_batch([]) == []


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array, lambda ids: np.array(ids, np.uint16)])
def test_special_tokens_are_skipped(small, kind):
    ids = small.encode("<a>é<b><a>.")
    assert small.decode(kind(ids), skip_special_tokens=True) == "é."
    assert small.decode(kind(ids)) == "<a>é<b><a>."
    assert small.decode_batch([kind(ids), kind([256])], skip_special_tokens=True) == ["é.", ""]
    assert Tokenizer(BYTES, []).decode(kind(list(b"ab")), skip_special_tokens=True) == "ab"


@settings(derandomize=True, deadline=None)
@given(ids=st.lists(st.integers(0, 257), max_size=30))
def test_streams_skip_special_tokens_like_decode(small, ids):
    stream = small.stream_decoder(skip_special_tokens=True)
    expected = bytes(id for id in ids if id < 256).decode(errors="replace")
    assert "".join(map(stream.decode, ids)) + stream.finish() == expected
    assert small.decode(ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_by_name_and_by_expression_are_equal(name):
    by_name, by_expression = Tokenizer(BYTES, [], pattern=name), Tokenizer(BYTES, [], pattern=PATTERNS[name])
    assert by_name.pattern == by_expression.pattern == name
    assert by_name.fingerprint == by_expression.fingerprint


class _OwnEncode(str):
    def encode(self, *_):
        return bytearray(b"other")


def test_subclasses_of_str_are_accepted(small):
    small.expect(1 << 40)
    assert small.encode("x") == small.encode(np.str_("x"))
    assert small.encode(_OwnEncode("q")) == small.encode_array(_OwnEncode("q")).tolist() == small.encode("q")


def test_choices_of_special_tokens_may_be_iterators():
    tokenizer = Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], ["<a>", "<b>"])
    assert tokenizer.encode("<a>", allowed_special=iter(["<a>"])) == [256]
    for method in (tokenizer.encode, tokenizer.encode_array, lambda text, **names: tokenizer.encode_batch([text], **names)):
        with pytest.raises(UserError, match="the text holds the special token '<a>' at byte 1"):
            method("x<a>", disallowed_special=iter(["<a>"]))
    pieces = ["x" * 40_000 + " ", "y" * 40_000 + " ", "<b>"]
    with pytest.raises(UserError, match="the text holds the special token '<b>'"):
        list(tokenizer.encode_iterable(pieces, disallowed_special=iter(["<b>"])))


@pytest.mark.parametrize("ids", [["a"], "ab", None, 5, [1.5]])
def test_ids_that_are_not_integers_raise(small, ids):
    with pytest.raises(TypeError, match=r"ids are .*integers"):
        small.decode(ids)


@pytest.mark.parametrize("texts", ["the cat", b"the cat", None, 5])
def test_a_batch_must_be_an_iterable_of_strings(small, texts):
    with pytest.raises(TypeError, match=r"texts is .*: expected an iterable of strings"):
        small.encode_batch(texts)
