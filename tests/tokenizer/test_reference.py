"""Plain Python compared with the naive trainer and with compiled code: all give the same results."""

import random
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from learning_cases import naive_merges, random_counts

from tilewright.errors import UserError
from tilewright.tokenizer import END_OF_TEXT, Documents, Files, Tokenizer, count_text, iter_encoded, reference, train_bpe
from tilewright.tokenizer.compiled.jit import Compiled
from tilewright.tokenizer.compiled.work import Work
from tilewright.tokenizer.counting.pretoken_counts import PretokenCounts
from tilewright.tokenizer.encoding import decoder
from tilewright.tokenizer.learning.learner import learn_merges
from tilewright.tokenizer.text.patterns import split_text
from tilewright.tokenizer.text.specials import SpecialFinder
from tilewright.tokenizer.text.utf8 import repair_utf8

steady = settings(derandomize=True, deadline=None, max_examples=60)
# Few letters give many ties and long runs; the others give tokens of several bytes.
texts = st.one_of(
    st.text(alphabet="ab", max_size=60),
    st.text(alphabet="abc '\n", max_size=200),
    st.text(alphabet="aeé中文🙂 's.1²\u3000\ud800", max_size=100),
    st.text(max_size=100),
)
patterns = st.sampled_from(["gpt2", "cl100k", "o200k", r"\p{L}+|\d|[^\p{L}\d]+"])


def both(function):
    """Return the results of a function, or the errors that it raises, in plain Python and in compiled code."""
    outcomes = []
    for answer in (False, True):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(Work, "is_compiled", lambda work, units, answer=answer: answer)
            patch.setattr(Compiled, "is_ready", answer)
            try:
                outcomes.append(function())
            except (UserError, TypeError, ValueError) as error:
                outcomes.append((type(error), str(error)))
    return outcomes


@pytest.mark.parametrize("ties", ["cs336", "huggingface"])
@pytest.mark.parametrize("seed", range(10))
def test_merges_equal_the_naive_trainers(ties, seed):
    rng = random.Random(seed)
    for _ in range(50):
        counts, num_merges = random_counts(rng), rng.randint(0, 40)
        options = {"min_frequency": rng.choice([1, 1, 2, 5]), "max_token_length": rng.choice([None, None, 2, 3, 10])}
        expected = naive_merges(counts, num_merges, ties, **options)
        pairs = [(left, right) for left, right, _ in reference.learn(counts, num_merges, ties=ties, **options)]
        made = reference.tokens(pairs)
        assert [(made[left], made[right]) for left, right in pairs] == expected


@pytest.mark.parametrize("ties", ["cs336", "huggingface"])
@pytest.mark.parametrize("seed", range(10))
def test_merges_equal_compiled_code(ties, seed):
    rng = random.Random(seed)
    for _ in range(40):
        counts = PretokenCounts.of(random_counts(rng))
        known = learn_merges(PretokenCounts.of(random_counts(rng)), rng.randint(0, 12)).pairs
        rules = {"min_frequency": rng.choice([1, 1, 2, 5]), "max_token_length": rng.choice([None, None, 2, 3, 10])}
        num_merges = rng.randint(0, 40)

        def learned():
            made = []
            found = learn_merges(counts, num_merges, ties=ties, known=known, progress=made.append, **rules)  # noqa: B023
            assert made == sorted(made)
            assert found.pairs.dtype == np.int32
            assert found.counts.dtype == np.int64
            return found.as_bytes(), found.counts.tolist()

        plain, compiled = both(learned)
        assert plain == compiled


def test_the_example_in_the_docstring():
    text = "low low lower newest newest widest"
    words = Counter(reference_split(text))
    merges = [(left, right) for left, right, _ in reference.learn(words, 10)]
    ranks, products = reference.ranks(merges)
    ids = [id for word in reference_split(text) for id in reference.merge_pretoken(list(word), ranks, products)]
    assert len(ids) < len(text)
    assert reference.decode(reference.tokens(merges), ids) == text.encode()


def reference_split(text):
    return [pretoken.encode() for pretoken in split_text(text)]


def arrays_of(text):
    counts = text.counts
    return (
        counts.data.tolist(),
        counts.ends.tolist(),
        counts.counts.tolist(),
        text.pattern,
        text.special_tokens,
        text.text_bytes,
    )


@steady
@given(documents=st.lists(st.tuples(texts, st.integers(1, 3)), min_size=1, max_size=4), pattern=patterns)
@example(documents=[("a" * 15 + "b" * 40 + " " + "c" * 16 + " " + "d" * 17, 1)], pattern="gpt2")
@example(documents=[("a<|endoftext|>b", 2), ("<|endoftext|>", 1)], pattern="cl100k")
def test_counts_equal_compiled_code(documents, pattern):
    plain, compiled = both(lambda: arrays_of(count_text(Documents(documents), (END_OF_TEXT, "ab"), pattern=pattern)))
    assert plain == compiled


@settings(steady, max_examples=30)
@given(text=texts, pattern=patterns, ties=st.sampled_from(["cs336", "huggingface"]), length=st.sampled_from([None, 2, 5]))
def test_training_equals_compiled_code(text, pattern, ties, length):
    options = {"pattern": pattern, "ties": ties, "max_token_length": length}
    plain, compiled = both(lambda: train_bpe(Documents([text, text[::2]]), 300, ["a b", "<|>"], **options))
    assert plain == compiled


def test_counts_of_invalid_utf8_equal_compiled_code(text_file):
    path = text_file(b"a\xffb \xe4\xb8 caf\xc3\xa9 \xf0\x9f\x98\x80 " * 50)
    plain, compiled = both(lambda: arrays_of(count_text([path, Files(path, weight=7)])))
    assert plain == compiled
    assert plain[2] != [0]


def test_counting_switches_to_compiled_code_midway(text_file, real_text, monkeypatch):
    lines = real_text.splitlines(keepends=True)
    expected = arrays_of(count_text(Documents(lines), (END_OF_TEXT,)))
    answers = iter([False] * 5)
    monkeypatch.setattr(Work, "is_compiled", lambda work, units: next(answers, True))
    assert arrays_of(count_text(Documents(lines), (END_OF_TEXT,), block_bytes=1 << 12)) == expected
    assert next(answers, None) is None


@pytest.fixture(scope="module")
def tokenizers(text_file, real_text):
    """A tokenizer for each pattern."""
    made = {}
    for pattern in ("gpt2", "cl100k", "o200k", r"\p{L}+|\d|[^\p{L}\d]+"):
        specials = [END_OF_TEXT, "<|", "a b"]
        made[pattern] = Tokenizer(*train_bpe(text_file(real_text), 600, specials, pattern=pattern), specials, pattern)
    return made


def results_of(data, text):
    """Return the results of all methods of a fresh tokenizer on a text."""
    tokenizer = Tokenizer.of(data)
    ids = tokenizer.encode(text)
    batch = tokenizer.encode_batch([text, "", text[::2]])
    plain = tokenizer.encode_array(text, allowed_special=(), disallowed_special=())
    return (
        ids,
        tokenizer.decode(ids),
        batch.ids.tolist(),
        batch.offsets.tolist(),
        plain.tolist(),
        plain.dtype,
        tokenizer.encode_bytes(text.encode(errors="replace") + b"\xff\xe4").tolist(),
        list(tokenizer.encode_iterable([text, text])),
        [row.tolist() for row in tokenizer.encode_with_offsets(text, "characters")],
    )


@steady
@given(text=texts | st.text(alphabet="ab <|>\nendoftx", max_size=40), pattern=patterns)
@example(text="<|endoftext|>a b<|", pattern="gpt2")
def test_encoding_equals_compiled_code(tokenizers, text, pattern):
    plain, compiled = both(lambda: results_of(tokenizers[pattern].data, text))
    assert plain == compiled


def test_errors_of_refused_special_tokens_equal_compiled_code(tokenizers):
    plain, compiled = both(lambda: tokenizers["gpt2"].encode("x<|endoftext|>" * 300, allowed_special=()))
    assert plain == compiled
    assert plain[0] is UserError


@pytest.mark.parametrize("ids", [[1, 1 << 20], [-1], [1 << 40], [255, 600], np.array([65_535], np.uint16), ["a"], [1.5]])
def test_errors_of_unknown_ids_equal_compiled_code(tokenizers, ids):
    plain, compiled = both(lambda: tokenizers["gpt2"].decode(ids))
    assert plain == compiled
    assert plain[0] in (UserError, TypeError)


@steady
@given(ids=st.lists(st.integers(0, 599), max_size=80), part=st.integers(1, 9))
def test_decoding_equals_compiled_code(tokenizers, ids, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_PART", part)
        plain, compiled = both(lambda: (tokenizers["gpt2"].decode_bytes(ids), tokenizers["gpt2"].decode(ids)))
    assert plain == compiled


@steady
@given(data=st.binary(max_size=80), names=st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), unique=True, max_size=4))
def test_repair_and_special_tokens_equal_compiled_code(data, names):
    array = np.frombuffer(data + b"ab<a" + data, np.uint8)
    plain, compiled = both(lambda: repair_utf8(array).tobytes())
    assert plain == compiled
    plain, compiled = both(lambda: SpecialFinder(names).find(array).tolist())
    assert plain == compiled


def test_encoding_a_file_equals_compiled_code(tokenizers, text_file, real_text):
    path = text_file(real_text)
    for tokenizer in tokenizers.values():
        plain, compiled = both(lambda: np.concatenate(list(iter_encoded(path, Tokenizer.of(tokenizer.data)))).tolist())  # noqa: B023
        assert plain == compiled
