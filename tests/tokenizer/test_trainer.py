import itertools
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import train_bpe
from tilewright.tokenizer.pretokens import count_pretokens
from tilewright.tokenizer.trainer import learn_merges

steady = settings(derandomize=True, deadline=None, max_examples=300)

# Few letters make many ties and long runs; the others make tokens of several bytes.
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
    counts = {}
    for pretoken in specification.split(text):
        counts[pretoken] = counts.get(pretoken, 0) + 1
    assert learn_merges(counts, num_merges) == specification.train(text, num_merges)


@settings(steady, max_examples=60)
@given(text=st.text(alphabet="ab<|> \n", min_size=1, max_size=200))
def test_special_tokens_are_hard_boundaries(specification, text_file, text):
    specials = ["<|>", "<|><|>", "a b"]
    _, merges = train(text_file(text), 256 + len(specials) + 20, specials)
    assert merges == specification.train(text, 20, specials)


def test_no_merge_enters_or_leaves_a_special_token(text_file):
    _, merges = train(text_file("ab<|end|>" * 50), 300, ["<|end|>"])
    assert merges == [(b"a", b"b")]


def test_real_text_trains_as_the_naive_trainer_says(specification, text_file, real_text):
    specials = ["<|endoftext|>"]
    _, merges = train_bpe(text_file(real_text[-20_000:]), 256 + 1 + 100, specials)
    assert merges == specification.train(real_text[-20_000:], 100, specials)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_number_of_workers_changes_nothing(text_file, real_text, num_workers):
    path = text_file(real_text)
    alone = train_bpe(path, 600, ["<|endoftext|>"], num_workers=1)
    assert train_bpe(path, 600, ["<|endoftext|>"], num_workers=num_workers) == alone


@pytest.mark.parametrize("special_tokens", [(), ("<|endoftext|>",), ("# =", "<|endoftext|>")])
def test_counts_do_not_depend_on_workers_or_chunks(specification, text_file, real_text, special_tokens):
    path = text_file(real_text)
    expected = {}
    for part in specification.split(real_text, special_tokens):
        if part not in special_tokens:
            expected[part] = expected.get(part, 0) + 1
    for num_workers, chunk_bytes in itertools.chain(zip([1] * 3, [10, 1000, 1 << 20], strict=True), [(2, 3000)]):
        assert count_pretokens(path, special_tokens, num_workers=num_workers, chunk_bytes=chunk_bytes) == expected


def test_bytes_that_are_not_utf8_count_as_replacement_characters(text_file):
    assert count_pretokens(text_file(b"caf\xe9 caf\xc3\xa9 \xff\xe4\xb8")) == {
        "caf": 1,
        "\ufffd": 1,
        " café": 1,
        " \ufffd\ufffd": 1,
    }


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
        ("text", 255, [], "vocab_size is 255: at least 256"),
        ("text", 257, ["<|a|>", "<|b|>"], "vocab_size is 257: at least 258"),
        ("text", 300, ["<|a|>", "<|a|>"], r"'<\|a\|>' is given twice"),
        ("text", 300, ["<|a|>", ""], "special token 1 is empty"),
        ("text", 300, ["a"], "single byte"),
        ("text", 300, ["\ud800"], "surrogate"),
    ],
)
def test_bad_input_is_named(text_file, tmp_path, content, vocab_size, special_tokens, message):
    path = tmp_path / "missing.txt" if content is None else text_file(content)
    with pytest.raises(UserError, match=message):
        train_bpe(path, vocab_size, special_tokens)


def test_arguments_that_make_no_sense_are_refused(text_file):
    with pytest.raises(TypeError, match="sequence of strings"):
        train_bpe(text_file("text"), 300, "<|endoftext|>")
    with pytest.raises(UserError, match="num_workers is 0"):
        train_bpe(text_file("text"), 300, num_workers=0)
