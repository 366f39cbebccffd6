import json

import numpy as np
import pytest
import torch

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.train.data import (
    HEADER_BYTES,
    TokenDataset,
    check_fits,
    decode_text,
    encode_text,
    open_dataset,
    training_batch,
    validation_batches,
    write_tokens,
)


@pytest.fixture
def dataset(tmp_path):
    """The numbers 0 .. 999 as tokens."""
    write_tokens(tmp_path / "count.tokens", [np.arange(400), np.arange(400, 1000)], 1000, "a fingerprint", 5)
    return TokenDataset(tmp_path / "count.tokens")


def test_a_token_file_says_what_it_is(dataset):
    with dataset.path.open("rb") as file:
        header = json.loads(file.readline())
    assert header == {
        "format": "tilewright-tokens-1",
        "dtype": "uint16",
        "num_tokens": 1000,
        "vocab_size": 1000,
        "tokenizer": "a fingerprint",
        "text_bytes": 5,
    }
    assert dataset.path.stat().st_size == HEADER_BYTES + 2 * 1000
    assert len(dataset) == 1000


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_never_overflow(tmp_path, vocab_size, dtype):
    header = write_tokens(tmp_path / "a.tokens", [np.array([0, vocab_size - 1])], vocab_size, "", 0)
    assert header.dtype == dtype
    windows = TokenDataset(tmp_path / "a.tokens").windows(np.array([0]), 2)
    assert windows.tolist() == [[0, vocab_size - 1]]


def test_an_interrupted_file_leaves_nothing(tmp_path):
    def arrays():
        yield np.arange(10)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_tokens(tmp_path / "a.tokens", arrays(), 10, "", 0)
    assert list(tmp_path.iterdir()) == []


def test_targets_are_the_inputs_one_later(dataset):
    inputs, targets = training_batch(dataset, seed=0, step=0, batch_size=8, context_length=16)
    assert inputs.shape == targets.shape == (8, 16)
    assert inputs.dtype == torch.long
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batches_depend_on_seed_and_step_alone(dataset):
    def starts(seed, step):
        return training_batch(dataset, seed, step, 8, 16)[0][:, 0].tolist()

    assert starts(0, 5) == starts(0, 5)
    assert starts(0, 5) != starts(0, 6)
    assert starts(0, 5) != starts(1, 5)
    # The first batch of seed 0, for ever: resuming with another NumPy must read the same.
    assert starts(0, 0) == GOLDEN


GOLDEN = [35, 122, 249, 300, 795, 717, 23, 108]


def test_every_place_can_be_drawn(dataset):
    drawn = {int(row[0]) for step in range(2000) for row in training_batch(dataset, 0, step, 8, 990)[0]}
    assert drawn == set(range(10))


def test_validation_covers_the_file_evenly_and_always_alike(dataset):
    batches = list(validation_batches(dataset, num_sequences=10, batch_size=4, context_length=16))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches])
    assert starts[0] == 0
    assert starts[-1] == 1000 - 17
    assert (starts.diff() >= 16).all()
    again = validation_batches(dataset, 10, 4, 16)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_a_short_validation_file_is_read_once(dataset):
    batches = validation_batches(dataset, num_sequences=400, batch_size=4, context_length=100)
    assert sum(len(inputs) for inputs, _ in batches) == 9


def test_text_survives_the_token_file(corpus, tmp_path):
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    header = encode_text(corpus / "train.txt", tokenizer, tmp_path / "train.tokens")
    assert header.num_tokens == len(tokenizer.encode((corpus / "train.txt").read_text()))
    dataset = TokenDataset(tmp_path / "train.tokens")
    assert b"".join(decode_text(dataset, tokenizer, piece_tokens=100)) == (corpus / "train.txt").read_bytes()


def test_a_text_is_encoded_once_beside_itself(corpus, tmp_path):
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    text = tmp_path / "story.txt"
    text.write_text("the cat sat on a mat")
    first = open_dataset(text, tokenizer)
    written = first.path.stat().st_mtime_ns
    assert first.path == tmp_path / "story.tokens"
    assert open_dataset(text, tokenizer).path.stat().st_mtime_ns == written
    assert open_dataset(first.path, tokenizer).header == first.header


def test_a_dataset_of_another_tokenizer_or_text_is_refused(corpus, tmp_path):
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    text = tmp_path / "story.txt"
    text.write_text("the cat sat on a mat")
    tokens = open_dataset(text, tokenizer).path
    before = tokens.read_bytes()
    other = Tokenizer(tokenizer.vocab, tokenizer.merges[:0], ["<|endoftext|>"])
    with pytest.raises(UserError, match=r"story.tokens was made by another tokenizer"):
        open_dataset(text, other)
    text.write_text("the cat sat on a longer mat")
    with pytest.raises(UserError, match=r"story.tokens was made from another story.txt"):
        open_dataset(text, tokenizer)
    assert tokens.read_bytes() == before


def test_missing_and_empty_texts_are_refused(corpus, tmp_path):
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    with pytest.raises(UserError, match=r"no.txt does not exist: make a corpus"):
        open_dataset(tmp_path / "no.txt", tokenizer)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        open_dataset(tmp_path / "empty.txt", tokenizer)


def test_files_that_are_not_whole_token_files_are_refused(dataset, tmp_path):
    whole = dataset.path.read_bytes()
    broken = tmp_path / "broken.tokens"
    for content, message in {
        b"some text": "is not a token file",
        whole.replace(b"tokens-1", b"tokens-9"): "is not a token file",
        whole.replace(b"uint16", b"int999"): "is not a token file",
        whole[:-2]: r"has 6094 bytes, its header says 6096",
    }.items():
        broken.write_bytes(content)
        with pytest.raises(UserError, match=message):
            TokenDataset(broken)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    write_tokens(tmp_path / "a.tokens", [np.array([1, 2, 50, 3])], 10, "", 0)
    with pytest.raises(UserError, match="holds token 50, outside its vocabulary of 10"):
        TokenDataset(tmp_path / "a.tokens").windows(np.array([0]), 4)


def test_a_model_must_fit_the_data(dataset):
    check_fits(dataset, vocab_size=1000, context_length=999)
    with pytest.raises(UserError, match=r"vocabulary of 1000 tokens, the model one of 999: set --model.vocab-size 1000"):
        check_fits(dataset, 999, 16)
    with pytest.raises(UserError, match=r"has 1000 tokens, fewer than one sequence of 1000 \+ 1"):
        check_fits(dataset, 1000, 1000)
