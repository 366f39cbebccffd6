import random
from collections import Counter

import numpy as np
import pytest
from learning_cases import naive_merges, random_counts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tilewright.errors import UserError
from tilewright.tokenizer.counting.pretoken_counts import PretokenCounts
from tilewright.tokenizer.formats import from_printable, to_printable
from tilewright.tokenizer.learning.learner import learn_merges


def learn(counts, *arguments, **options):
    return learn_merges(PretokenCounts.of(counts), *arguments, **options).as_bytes()


@pytest.mark.parametrize("ties", ["cs336", "huggingface"])
@pytest.mark.parametrize("seed", range(15))
def test_merges_equal_the_naive_trainers(ties, seed):
    rng = random.Random(seed)
    for _ in range(50):
        counts, num_merges = random_counts(rng), rng.randint(0, 40)
        options = {"min_frequency": rng.choice([1, 1, 2, 5]), "max_token_length": rng.choice([None, None, 2, 3, 10])}
        expected = naive_merges(counts, num_merges, ties, **options)
        learned = learn_merges(PretokenCounts.of(counts), num_merges, ties=ties, **options)
        assert learned.as_bytes() == expected
        # The same again, after given initial merges.
        known = learned.pairs[: rng.randint(0, len(expected))]
        again = learn_merges(PretokenCounts.of(counts), num_merges, ties=ties, known=known, **options)
        assert np.array_equal(again.pairs, learned.pairs)
        assert np.array_equal(again.counts, learned.counts)


@pytest.mark.parametrize("seed", range(5))
def test_learning_continues_known_merges_of_another_text(seed):
    rng = random.Random(seed)
    for _ in range(60):
        known = learn_merges(PretokenCounts.of(random_counts(rng)), rng.randint(0, 15))
        counts = random_counts(rng)
        expected = naive_merges(counts, 30, known=known.as_bytes())
        assert learn(counts, 30, known=known.pairs) == expected


def merges_of_huggingface(counts, num_merges):
    # Spaces are the only borders, and the alphabet includes every byte from the start.
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + num_merges, initial_alphabet=alphabet, show_progress=False)
    words = [to_printable(word) for word, count in counts.items() for _ in range(count)]
    peer.train_from_iterator([" ".join(words)], trainer)
    vocab = peer.get_vocab()
    return [from_printable(token) for token in sorted(vocab, key=vocab.__getitem__)][256:]


@pytest.mark.parametrize("seed", range(10))
def test_ties_equal_huggingfaces(seed):
    rng = random.Random(seed)
    for _ in range(30):
        counts = random_counts(rng)
        merges = learn(counts, 40, ties="huggingface")
        assert [left + right for left, right in merges] == merges_of_huggingface(counts, 40)


def test_real_text_gives_huggingfaces_merges(specification, real_text):
    counts = Counter(pretoken.encode() for pretoken in specification.split(real_text))
    merges = learn(counts, 1000, ties="huggingface")
    assert [left + right for left, right in merges] == merges_of_huggingface(counts, 1000)


def test_counts_need_64_bits():
    learned = learn_merges(PretokenCounts.of({b"ab": 1 << 60, b"cd": (1 << 60) + 1}), 2)
    assert learned.as_bytes() == [(b"c", b"d"), (b"a", b"b")]
    assert learned.counts.tolist() == [(1 << 60) + 1, 1 << 60]


def test_tokens_with_equal_first_eight_bytes_are_ordered():
    # All byte pairs are equally frequent, so only the later bytes decide.
    words = {b"abcdefghi" + bytes([last]) * 2: 1 for last in b"xyz"}
    assert learn(words, 40) == naive_merges(words, 40)
    assert learn(words, 40, ties="huggingface") == naive_merges(words, 40, "huggingface")


@pytest.mark.parametrize("letters", [b"a", b"ACGT"], ids=["one letter", "dna"])
def test_long_runs_take_linear_time(letters):
    text = bytes(random.Random(0).choices(letters, k=1_000_000))
    learned = learn_merges(PretokenCounts.of({text: 1}), 300)
    tokens = learned.tokens()
    if len(letters) == 1:
        assert [len(token) for token in tokens[256:275]] == [2 << power for power in range(19)]
    else:
        assert len(learned) == 300
        # The most frequent pair of bytes, counted in another way.
        assert learned.counts[0] == max(sum(1 for i in range(len(text) - 1) if text[i : i + 2] == tokens[256]), 1)


def test_progress_rises_to_the_end():
    made = []
    text = bytes(random.Random(1).choices(b"abcdefgh", k=20_000))
    learn_merges(PretokenCounts.of({text: 1}), 1000, progress=made.append)
    assert made == sorted(made)
    assert made[-1] == 1000
    assert len(made) > 2


def test_no_pairs_give_no_merges():
    assert learn({}, 10) == []
    assert learn({b"a": 5, b"b": 1}, 10) == []
    assert learn({b"ab": 5}, 0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "none"}, "ties is 'none': expected one of cs336, huggingface"),
        ({"min_frequency": 0}, "min_frequency is 0: expected an integer from 1"),
        ({"max_token_length": 1}, "max_token_length is 1: expected an integer from 2"),
        ({"max_token_length": 2, "known": np.array([[97, 98], [256, 97]])}, "expected at least 3, for known merge 1"),
    ],
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(UserError, match=message):
        learn({b"abab": 1}, 10, **options)


def test_known_merges_with_unknown_ids_raise():
    with pytest.raises(ValueError, match="known merge 0 is of 97 and 256: expected ids from 0 to 255"):
        learn({b"abab": 1}, 10, known=np.array([[97, 256]]))
