"""From plain Python to compiled code: when, once, and with any number of threads."""

import threading

import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.tokenizer.compiled.work import Work
from tilewright.tokenizer.encoding.decoder import token_table
from tilewright.tokenizer.encoding.encoder import CompiledEncoder, PlainEncoder
from tilewright.tokenizer.encoding.lazy_encoder import LazyEncoder, encoding_work
from tilewright.tokenizer.text.patterns import PATTERNS

VOCAB = {id: bytes([id]) for id in range(256)} | {256: b"ab", 257: b"abc"}
MERGES = [(b"a", b"b"), (b"ab", b"c")]
UINT16 = np.dtype(np.uint16)


def lazy(merges=MERGES, pattern="gpt2"):
    return LazyEncoder(merges, {token: id for id, token in VOCAB.items()}, token_table(VOCAB), pattern)


def encode(encoder, data):
    none = np.empty(0, np.int64), np.empty(0, np.uint32)
    return encoder.encode(np.frombuffer(data, np.uint8), *none, UINT16)[0].tolist()


@pytest.fixture
def answers(monkeypatch):
    """What is answered next to whether the work is to be compiled, and the sizes that were asked for."""
    asked = []
    left = []

    def answer(work, units):
        asked.append(units)
        return left.pop(0)

    monkeypatch.setattr(Work, "is_compiled", answer)
    return left, asked


def test_texts_are_encoded_in_python_until_compiled_code_pays(answers):
    left, asked = answers
    left += [False, False, True]
    encoder = lazy()
    for _ in range(5):
        assert encode(encoder, b"abcab") == [257, 256]
    # When it is compiled, nobody asks any more.
    assert asked == [5, 5, 5]
    assert isinstance(encoder.encode.__self__, CompiledEncoder)


def test_what_is_expected_counts_before_it_comes(answers):
    left, asked = answers
    left += [True]
    encoder = lazy()
    assert isinstance(encoder.chosen(1 << 30), CompiledEncoder)
    assert encode(encoder, b"abc") == [257]
    assert asked == [1 << 30]


def test_an_order_that_no_training_gives_stays_in_python(answers):
    left, _ = answers
    left += [True]
    encoder = lazy([(b"ab", b"c"), (b"a", b"b")])
    # The pair (ab, c) merges before there is an ab; afterwards it comes first.
    assert encode(encoder, b"abcab") == [257, 256]
    assert isinstance(encoder.encode.__self__, PlainEncoder)


def test_merges_that_do_not_fit_are_an_error_at_once():
    with pytest.raises(UserError, match="merge 0, b'x' b'y', needs b'xy', which is not in the vocabulary"):
        lazy([(b"x", b"y")])


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\S+|\s"])
def test_a_pattern_has_one_count_of_what_was_encoded(pattern):
    work = encoding_work(pattern)
    assert encoding_work(pattern) is work
    names = {each.name for each in work._entries}
    assert "pretoken_cache.write_ids" in names
    assert [name for name in names if name.startswith("scanner.")] == [f"scanner._scan_{pattern}"] * (pattern in PATTERNS)


def test_threads_go_over_together(monkeypatch):
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
