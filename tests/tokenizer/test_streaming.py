import itertools
import random
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tokenizer import Tokenizer
from tilewright.tokenizer.text.patterns import split_pretokens

# All characters that the pattern looks ahead for, all kinds of white space, and special tokens that overlap, contain white
# space and share prefixes.
ALPHABET = " \n\t\r\u3000\u00a0\x1c\x85'sdmtlverST1²a中é\u0301🙂!<|>\ufffd"
SPECIALS = ("<|>", "<|><|>", "<|>a<", "s t", "\n\n", " !")

steady = settings(derandomize=True, deadline=None, max_examples=500)
texts = st.text(alphabet=ALPHABET, max_size=60) | st.lists(st.sampled_from([*SPECIALS, "'ll", " 've", "  ", "a"])).map("".join)


def cut(text, places):
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def join(runs):
    parts = []
    for run, special in runs:
        parts += run
        if special is not None:
            parts.append(special)
    return parts


@steady
@given(
    text=texts,
    places=st.lists(st.integers(0, 1000), max_size=8),
    special_tokens=st.sampled_from([(), SPECIALS, SPECIALS[:2]]),
    block_chars=st.integers(1, 20),
)
def test_splits_are_independent_of_cuts(specification, text, places, special_tokens, block_chars):
    runs = split_pretokens(cut(text, places), special_tokens, block_chars=block_chars)
    assert join(runs) == specification.split(text, special_tokens)


@steady
@given(text=texts)
def test_single_characters_as_pieces(specification, text):
    assert join(split_pretokens(text, SPECIALS, block_chars=1)) == specification.split(text, SPECIALS)


@settings(steady, max_examples=50)
@given(seed=st.integers(0, 10**6))
def test_encode_iterable_equals_encode(tokenizer, real_text, seed):
    rng = random.Random(seed)
    start = rng.randrange(len(real_text))
    text = real_text[start : start + 40_000]
    pieces = cut(text, [rng.randrange(len(text) + 1) for _ in range(rng.choice([0, 3, 1000]))])
    assert list(tokenizer.encode_iterable(pieces)) == tokenizer.encode(text)


def test_special_tokens_across_pieces_are_found(tokenizer):
    assert list(tokenizer.encode_iterable(["a<|endof", "", "text|>", " b"])) == tokenizer.encode("a<|endoftext|> b")


def test_the_first_ids_come_before_the_last_piece_is_read(tokenizer):
    endless = itertools.repeat("A line of text.\n")
    first = list(itertools.islice(tokenizer.encode_iterable(endless), 100))
    assert first == tokenizer.encode("A line of text.\n" * 50)[:100]


def test_memory_does_not_grow_with_the_text(tokenizer, real_text):
    lines = (real_text * (5_000_000 // len(real_text) + 1)).splitlines(keepends=True)
    fresh = Tokenizer(tokenizer.vocab, tokenizer.merges, list(tokenizer.special_tokens))
    fresh.encode(real_text)
    tracemalloc.start()
    try:
        count = sum(1 for _ in fresh.encode_iterable(lines))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count > 1_000_000
    assert peak < 1_000_000


def test_a_long_run_in_small_pieces_takes_linear_time(tokenizer):
    pieces = itertools.repeat("abc", 70_000)
    assert tokenizer.decode(tokenizer.encode_iterable(pieces)) == "abc" * 70_000
