import itertools

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer.encoding import decoder
from tilewright.tokenizer.encoding.decoder import StreamDecoder, decode_array, decode_bytes, decode_text, token_table

VOCAB = {id: bytes([id]) for id in range(256)} | {256: b"ab", 257: " 中文字符的".encode(), 258: b"\xe4\xb8", 259: b"x" * 33}
TABLE = token_table(VOCAB)
GAPS = token_table({0: b"a", 3: b"ccc", 7: b"g"})

steady = settings(derandomize=True, deadline=None, max_examples=300)
ids_of = st.lists(st.integers(0, 259), max_size=60) | st.lists(st.sampled_from([0xE4, 0xB8, 0xAD, 257, 258, 65]), max_size=12)


@steady
@given(ids=ids_of, dtype=st.sampled_from([np.uint16, np.int32, np.uint32, np.int64, np.uint64]))
def test_decoded_bytes_equal_joined_tokens(ids, dtype):
    expected = b"".join(map(VOCAB.__getitem__, ids))
    assert decode_bytes(TABLE, ids) == expected
    assert decode_bytes(TABLE, np.array(ids, dtype)) == expected
    assert decode_bytes(TABLE, np.repeat(np.array(ids, dtype), 2)[::2]) == expected
    assert decode_text(TABLE, ids) == expected.decode(errors="replace")
    assert decode_array(TABLE, ids).dtype == np.uint8


@steady
@given(
    characters=st.lists(
        st.sampled_from([b"a", "é".encode(), "中".encode(), "😀".encode(), b"\x80", b"\xe4\xb8", b"\xf0\x9f\x98"])
    ),
    part=st.integers(1, 9),
)
def test_text_decoded_in_parts_equals_the_whole(characters, part):
    data = b"".join(characters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_PART", part)
        assert decode_text(TABLE, list(data)) == data.decode(errors="replace")


@pytest.mark.parametrize("kind", [tuple, iter, bytes, lambda ids: (np.uint16(id) for id in ids)])
def test_ids_of_any_type_are_accepted(kind):
    assert decode_bytes(TABLE, kind([104, 105])) == b"hi"
    assert decode_bytes(TABLE, kind([])) == b""


def test_many_ids_decode_as_in_tiktoken():
    ids = np.random.default_rng(0).integers(0, 260, 100_000)
    ranks = {token: id for id, token in VOCAB.items()}
    reference = tiktoken.Encoding("own", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    assert decode_bytes(TABLE, ids) == reference.decode_bytes(ids.tolist())
    assert decode_text(TABLE, ids) == reference.decode(ids.tolist())


def test_adjacent_tokens_of_every_length():
    vocab = {size: bytes([size]) * size for size in range(1, 200)}
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(1, 200), 3))
    assert decode_bytes(token_table(vocab), ids) == b"".join(map(vocab.__getitem__, ids.tolist()))


@pytest.mark.parametrize(
    ("table", "ids", "message"),
    [
        (token_table({0: b"a", 2: b"b"}), [1], "id 1 is not in the vocabulary: it is unused"),
        (TABLE, [1, 260, -3], "id 260 is not in the vocabulary: expected an id from 0 to 259"),
        (TABLE, [-1], "id -1 is not"),
        (TABLE, [1, 1 << 40], f"id {1 << 40} is not"),
        (TABLE, [1, -(1 << 70)], f"id {-(1 << 70)} is not"),
        (TABLE, np.array([5, 65_535], np.uint16), "id 65535 is not"),
        (TABLE, np.array([1 << 63], np.uint64), f"id {1 << 63} is not"),
        (GAPS, [3, 4, 0], "id 4 is not in the vocabulary"),
    ],
)
def test_unknown_ids_raise(table, ids, message):
    with pytest.raises(UserError, match=message):
        decode_bytes(table, ids)


def test_a_vocabulary_may_have_gaps():
    assert decode_text(GAPS, [7, 3, 0]) == "gccca"


@pytest.mark.parametrize("ids", [[1.5], np.array([1.0]), np.zeros((2, 2), np.int64), ["a"], np.array([True])])
def test_other_arrays_raise(ids):
    with pytest.raises(TypeError):
        decode_bytes(TABLE, ids)


def test_errors_equal_bytes_decode():
    broken = [104, 258, 105]
    for errors in ("replace", "ignore", "backslashreplace"):
        assert decode_text(TABLE, broken, errors) == b"h\xe4\xb8i".decode(errors=errors)
    with pytest.raises(UnicodeDecodeError):
        decode_text(TABLE, broken, "strict")
    for use in (lambda: decode_text(TABLE, [104], "repalce"), lambda: StreamDecoder(TABLE, "repalce")):
        with pytest.raises(UserError, match="errors is 'repalce': expected replace"):
            use()


@steady
@given(ids=ids_of, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_joined_stream_equals_the_whole_text(ids, cuts):
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    decoder = StreamDecoder(TABLE)
    for _ in range(2):
        pieces = [decoder.decode(ids[start:end]) for start, end in itertools.pairwise(borders)]
        assert "".join([*pieces, decoder.finish()]) == decode_text(TABLE, ids)
        one_by_one = [decoder.decode(id) for id in np.array(ids, np.uint16)]
        assert "".join([*one_by_one, decoder.finish()]) == decode_text(TABLE, ids)


def test_a_stream_holds_back_incomplete_characters():
    decoder = StreamDecoder(TABLE)
    assert [decoder.decode(id) for id in (0xF0, 0x9F, 0x99, 0x82, 258)] == ["", "", "", "🙂", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""
    strict = StreamDecoder(TABLE, "strict")
    assert strict.decode([258]) == ""
    with pytest.raises(UnicodeDecodeError):
        strict.finish()
