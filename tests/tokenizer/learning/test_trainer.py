import warnings
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import train_bpe
from tilewright.tokenizer.counting import count_text as pretokens
from tilewright.tokenizer.counting.count_text import count_text
from tilewright.tokenizer.counting.pretoken_counts import PretokenCounts
from tilewright.tokenizer.learning.learner import learn_merges
from tilewright.tokenizer.learning.trainer import learn_bpe, shorten_vocab
from tilewright.tokenizer.text.patterns import resolve_pattern, split_text
from tilewright.tokenizer.text.sources import Documents, Files

steady = settings(derandomize=True, deadline=None, max_examples=300)

# Few letters give many ties and long runs; the others give tokens of several bytes.
texts = st.one_of(
    st.text(alphabet="ab", max_size=60),
    st.text(alphabet="abc '\n", max_size=200),
    st.text(alphabet="aeé中文🙂 's.1²\u3000", max_size=100),
    st.text(max_size=100),
)


def train(path, vocab_size, special_tokens=(), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_bpe(path, vocab_size, special_tokens, **options)


def test_the_example_of_the_course(text_file):
    words = ["low"] * 5 + ["lower"] * 2 + ["widest"] * 3 + ["newest"] * 6
    _, merges = train_bpe(text_file("\n".join(words)), 256 + 12)
    expected = "s t,e st,o w,l ow,w est,n e,ne west,w i,wi d,wid est,low e,lowe r"
    assert merges == [tuple(map(str.encode, merge.split())) for merge in expected.split(",")]


def test_ids_are_bytes_then_merges_then_special_tokens(text_file):
    vocab, merges = train_bpe(text_file("the cat the cat<|end|>"), 262, ["<|end|>", "<|pad|>"])
    assert list(vocab) == list(range(262))
    assert [vocab[id] for id in range(256)] == [bytes([id]) for id in range(256)]
    assert [vocab[id] for id in range(256, 260)] == [left + right for left, right in merges]
    assert [vocab[260], vocab[261]] == [b"<|end|>", b"<|pad|>"]


@steady
@given(text=texts, num_merges=st.integers(0, 40))
def test_merges_equal_the_naive_trainers(specification, text, num_merges):
    counts = Counter(pretoken.encode() for pretoken in specification.split(text))
    assert learn_merges(PretokenCounts.of(counts), num_merges).as_bytes() == specification.train(text, num_merges)


@settings(steady, max_examples=60)
@given(text=st.text(alphabet="ab<|> \n", min_size=1, max_size=200))
def test_special_tokens_are_hard_boundaries(specification, text_file, text):
    specials = ["<|>", "<|><|>", "a b"]
    _, merges = train(text_file(text), 256 + len(specials) + 20, specials)
    assert merges == specification.train(text, 20, specials)


def test_no_merge_crosses_a_special_token(text_file):
    _, merges = train(text_file("ab<|end|>" * 50), 300, ["<|end|>"])
    assert merges == [(b"a", b"b")]


def test_merges_of_real_text_equal_the_naive_trainers(specification, text_file, real_text):
    specials = ["<|endoftext|>"]
    _, merges = train_bpe(text_file(real_text[-20_000:]), 256 + 1 + 100, specials)
    assert merges == specification.train(real_text[-20_000:], 100, specials)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_merges_are_independent_of_the_number_of_workers(text_file, real_text, num_workers):
    path = text_file(real_text)
    alone = train_bpe(path, 600, ["<|endoftext|>"], num_workers=1)
    assert train_bpe(path, 600, ["<|endoftext|>"], num_workers=num_workers) == alone


def test_one_long_run_takes_linear_time(text_file):
    _, merges = train(text_file("a" * 200_000), 300)
    assert [len(left) for left, _ in merges[:17]] == [2**power for power in range(17)]


def test_too_little_text_gives_a_smaller_vocabulary_and_a_warning(text_file):
    with pytest.warns(UserWarning, match="has 259 tokens, not 1000"):
        vocab, merges = train_bpe(text_file("abab\n"), 1000, ["<|end|>"])
    assert merges == [(b"a", b"b"), (b"ab", b"ab")]
    assert len(vocab) == 259


@pytest.mark.parametrize(
    ("content", "vocab_size", "special_tokens", "message"),
    [
        (None, 300, [], "does not exist"),
        ("", 300, [], "is empty"),
        ("text", 255, [], "vocab_size is 255: expected an integer from 256"),
        ("text", 257, ["<|a|>", "<|b|>"], "vocab_size is 257: expected at least 258"),
        ("text", 300.0, [], "vocab_size is 300.0: expected an integer"),
        ("text", 1 << 40, [], "vocab_size is .*: expected at most 16777216"),
        ("text", 300, ["<|a|>", "<|a|>"], r"'<\|a\|>' is given twice"),
        ("text", 300, ["<|a|>", ""], "special token 1 is empty"),
        ("text", 300, ["a"], "single byte"),
        ("text", 300, ["\ud800"], "surrogate"),
    ],
)
def test_invalid_input_raises(text_file, tmp_path, content, vocab_size, special_tokens, message):
    path = tmp_path / "missing.txt" if content is None else text_file(content)
    with pytest.raises(UserError, match=message):
        train_bpe(path, vocab_size, special_tokens)


def test_invalid_arguments_raise(text_file):
    with pytest.raises(TypeError, match="sequence of strings"):
        train_bpe(text_file("text"), 300, "<|endoftext|>")
    with pytest.raises(UserError, match="num_workers is 0"):
        train_bpe(text_file("text"), 300, num_workers=0)


SPECIALS = ["<|endoftext|>"]


@pytest.fixture(scope="module")
def counted(text_file, real_text):
    return count_text(text_file(real_text), tuple(SPECIALS))


def test_train_bpe_equals_count_text_and_learn_bpe(text_file, real_text, counted):
    assert learn_bpe(counted, 500) == train_bpe(text_file(real_text), 500, SPECIALS)


def test_a_smaller_vocabulary_is_a_prefix_of_a_larger_one(counted):
    _, merges = learn_bpe(counted, 700)
    assert shorten_vocab(merges, 450, SPECIALS) == learn_bpe(counted, 450)


def test_training_continues_known_merges(counted):
    vocab, merges = learn_bpe(counted, 500)
    assert learn_bpe(counted, 500, known_merges=merges[:100]) == (vocab, merges)
    foreign = [(b"z", b"z"), (b"zz", b"z"), (b"t", b"h")]
    _, merges = learn_bpe(counted, 300, known_merges=foreign)
    assert merges[:3] == foreign
    assert merges[3] != (b"t", b"h")


def test_invalid_known_merges_raise(counted):
    with pytest.raises(UserError, match=r"known merge 0, b'ab' b'c', needs b'ab', which no earlier merge produces"):
        learn_bpe(counted, 300, known_merges=[(b"ab", b"c")])
    with pytest.raises(UserError, match="vocab_size is 258: expected at least 259, with the 2 known merges"):
        learn_bpe(counted, 258, known_merges=[(b"a", b"b"), (b"ab", b"c")])
    with pytest.raises(UserError, match=r"known merge 1, b'a' b'b', produces b'ab', which is a token already"):
        learn_bpe(counted, 300, known_merges=[(b"a", b"b"), (b"a", b"b")])


@pytest.mark.parametrize("pattern", ["cl100k", "o200k", r"\p{L}+|\d|[^\p{L}\d]+"])
def test_merges_stay_within_the_pretokens_of_the_pattern(specification, text_file, pattern, real_text):
    _, merges = train(text_file(real_text[:30_000]), 320, pattern=pattern)
    whole = resolve_pattern(pattern)
    found = {pretoken.encode() for pretoken in split_text(real_text[:30_000], whole)}
    assert all(any(left + right in pretoken for pretoken in found) for left, right in merges)


def test_options_reach_the_learner(text_file):
    path = text_file("abcd " * 10 + "xy")
    assert train(path, 300, min_frequency=2)[1] == [(b"c", b"d"), (b"b", b"cd"), (b"a", b"bcd"), (b" ", b"abcd")]
    assert max(len(left + right) for left, right in train(path, 300, max_token_length=3)[1]) == 3
    assert train(path, 257, ties="huggingface")[1] == [(b"a", b"b")]
    assert train(path, 257)[1] == [(b"c", b"d")]


def test_weights_affect_the_merges(text_file):
    inputs = [Files(text_file("abababab")), Files(text_file("xy"), weight=100)]
    assert train(inputs, 257)[1] == [(b"x", b"y")]
    assert train(Documents([("ab", 3), ("xy", 2)]), 257)[1] == [(b"a", b"b")]


def test_merges_are_independent_of_memory(text_file, real_text, monkeypatch, tmp_path):
    monkeypatch.setattr(pretokens, "LEAST_MEMORY", 1)
    path = text_file(real_text)
    assert train_bpe(path, 500, SPECIALS, memory=1 << 18, scratch=tmp_path) == train_bpe(path, 500, SPECIALS)


def test_inputs_without_text_raise():
    with pytest.raises(UserError, match="no text"):
        train_bpe(Documents([""]), 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "none"}, "ties is 'none': expected one of cs336, huggingface"),
        ({"min_frequency": 0}, "min_frequency is 0: expected an integer from 1"),
        ({"max_token_length": 1}, "max_token_length is 1: expected an integer from 2"),
        ({"min_frequency": 2.5}, "min_frequency is 2.5: expected an integer"),
        ({"min_frequency": 1 << 70}, "expected an integer from"),
        ({"max_token_length": 1 << 70}, "expected an integer from"),
        (
            {"pattern": "cl100k_base"},
            "pattern is 'cl100k_base': expected one of gpt2, .*, or a regular expression",
        ),
        ({"pattern": "GPT2"}, "expected one of gpt2, cl100k, o200k"),
        ({"pattern": ""}, "expected one of gpt2, cl100k, o200k"),
        ({"pattern": "a{99999999999999999999}"}, "expected one of gpt2, cl100k, o200k"),
        ({"pattern": "("}, "expected one of gpt2, cl100k, o200k, .*, or a regular expression"),
        ({"memory": 1000}, "memory is 1000 bytes: expected at least 16777216 for 1 workers"),
        ({"scratch": "none/there"}, "scratch is none/there: expected an existing folder"),
    ],
)
def test_options_out_of_range_raise_before_text_is_read(text_file, options, message, monkeypatch):
    monkeypatch.setattr(pretokens, "_count_block", None)
    with pytest.raises(UserError, match=message):
        train_bpe(text_file("text"), 300, **options)
