"""The switch from plain Python to compiled code: when it happens, that it happens once, and in several threads."""

import threading

import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.tokenizer.compiled.work import Work
from tilewright.tokenizer.encoding.compiled_encoder import CompiledEncoder
from tilewright.tokenizer.encoding.decoder import token_table
from tilewright.tokenizer.encoding.lazy_encoder import LazyEncoder, encoding_work
from tilewright.tokenizer.text.patterns import PATTERNS

VOCAB = {id: bytes([id]) for id in range(256)} | {256: b"ab", 257: b"abc"}
MERGES = [(b"a", b"b"), (b"ab", b"c")]
NONE = np.empty(0, np.int64), np.empty(0, np.uint32)


def lazy(merges=MERGES, pattern="gpt2"):
    return LazyEncoder(merges, {token: id for id, token in VOCAB.items()}, token_table(VOCAB), pattern, {}, NONE[0])


def encode(encoder, data):
    return encoder.encode(data, *NONE).tolist()


@pytest.fixture
def answers(monkeypatch):
    """The next answers of `Work.is_compiled`, and the sizes it was called with."""
    asked = []
    left = []

    def answer(work, units):
        asked.append(units)
        return left.pop(0)

    monkeypatch.setattr(Work, "is_compiled", answer)
    return left, asked


def test_texts_are_encoded_in_python_until_compiling_is_worthwhile(answers):
    left, asked = answers
    left += [False, False, True]
    encoder = lazy()
    for _ in range(5):
        assert encode(encoder, b"abcab") == [257, 256]
    # Once compiled, the encoder does not call it again.
    assert asked == [5, 5, 5]
    assert isinstance(encoder.encode.__self__, CompiledEncoder)


def test_expected_text_counts_in_advance(answers):
    left, asked = answers
    left += [True]
    encoder = lazy()
    assert isinstance(encoder.encoder_for(1 << 30), CompiledEncoder)
    assert encode(encoder, b"abc") == [257]
    assert asked == [1 << 30]


def test_both_encoders_support_whole_tokens(answers):
    left, _ = answers
    left += [False, True]
    vocab = VOCAB | {258: b"zz"}
    ids = {token: id for id, token in vocab.items()}
    encoder = LazyEncoder(MERGES, ids, token_table(vocab), "gpt2", {b"zz": 258, b"ab": 256}, NONE[0])
    kinds = set()
    for _ in range(3):
        kinds.add(type(encoder.encode.__self__))
        assert encode(encoder, b"zz abzz") == [258, 32, 256, 122, 122]
    assert kinds == {LazyEncoder, CompiledEncoder}


def test_invalid_merges_raise_at_once():
    with pytest.raises(UserError, match="merge 0, b'x' b'y', needs b'xy', which is not in the vocabulary"):
        lazy([(b"x", b"y")])


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\S+|\s"])
def test_tokenizers_of_a_pattern_share_their_work(pattern):
    work = encoding_work(pattern)
    assert encoding_work(pattern) is work
    names = {each.name for each in work._entries}
    assert "encode_loop.encode_pretokens" in names
    # The encoder's loop finds GPT-2's pretokens itself, and `regex` those of an expression.
    assert any("scan" in name for name in names) == (pattern in PATTERNS and pattern != "gpt2")


def test_threads_switch_together(monkeypatch):
    asked = iter(range(10_000))
    monkeypatch.setattr(Work, "is_compiled", lambda work, units: next(asked) > 100)
    encoder = lazy()
    wrong = []

    def work():
        for _ in range(100):
            if encode(encoder, b"abcab" * 20) != [257, 256] * 20:
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert isinstance(encoder.encode.__self__, CompiledEncoder)
