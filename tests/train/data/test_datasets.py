import os

import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.train.config import DataConfig
from tilewright.train.data.datasets import check_tokens, open_data, open_dataset
from tilewright.train.data.token_file import FileStamp, TokenDataset, write_tokens


@pytest.fixture
def dataset(tmp_path):
    """The numbers 0 .. 999 as tokens."""
    write_tokens(tmp_path / "count.tokens", [np.arange(1000)], 1000)
    return TokenDataset(tmp_path / "count.tokens")


@pytest.fixture
def tokenizer(corpus):
    return Tokenizer.load(corpus / "tokenizer.json")


@pytest.fixture
def text(tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("the cat sat on a mat")
    return text


def rewrite(text, content):
    """Write the text with a later modification time, as an editor does."""
    text.write_text(content)
    os.utime(text, ns=(0, FileStamp.of(text).mtime_ns + 10**9))


def test_text_is_encoded_once(text, tokenizer, monkeypatch):
    first = open_dataset(text, tokenizer)
    assert first.path == text.with_suffix(".tokens")
    written = first.path.stat().st_mtime_ns
    # The text is not read again either.
    monkeypatch.setattr("tilewright.train.data.encoded_file.text_sha256", None)
    assert open_dataset(text, tokenizer).path.stat().st_mtime_ns == written
    assert open_dataset(first.path, tokenizer).header == first.header


def test_open_data_opens_training_and_validation_files(text, corpus, tokenizer, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("a red bird")
    tokens = open_dataset(other, tokenizer).path
    config = DataConfig(train=(text, tokens), valid=corpus / "valid.txt", tokenizer=corpus / "tokenizer.json")
    train, valid = open_data(config, tokenizer)
    assert [dataset.path for dataset in train] == [text.with_suffix(".tokens"), tokens]
    assert valid.path == corpus / "valid.tokens"
    assert len(valid) == len(tokenizer.encode((corpus / "valid.txt").read_text()))


def test_another_tokenizer_is_rejected(text, tokenizer):
    tokens = open_dataset(text, tokenizer).path
    before = tokens.read_bytes()
    other = Tokenizer(tokenizer.vocab, tokenizer.merges[:0], ["<|endoftext|>"])
    for path in (text, tokens):
        with pytest.raises(UserError, match=r"story.tokens was encoded with another tokenizer"):
            open_dataset(path, other)
    assert tokens.read_bytes() == before


@pytest.mark.parametrize("content", ["the cat sat on a longer mat", "the bat sat on a mat"])
def test_changed_text_is_rejected_even_if_its_size_is_equal(text, tokenizer, content):
    tokens = open_dataset(text, tokenizer).path
    before = tokens.read_bytes()
    rewrite(text, content)
    with pytest.raises(UserError, match=r"story.tokens was encoded from another story.txt; remove it"):
        open_dataset(text, tokenizer)
    assert tokens.read_bytes() == before


def test_changed_text_with_an_older_time_is_rejected(text, tokenizer):
    open_dataset(text, tokenizer)
    text.write_text("the bat sat on a mat")
    os.utime(text, ns=(0, 0))
    with pytest.raises(UserError, match=r"story.tokens was encoded from another story.txt"):
        open_dataset(text, tokenizer)


@pytest.mark.parametrize("content", ["the bat sat on a mat", "the cat", ""])
def test_second_text_with_the_same_stem_is_rejected(text, tokenizer, content):
    other = text.with_suffix(".md")
    other.write_text(content)
    os.utime(other, ns=(text.stat().st_atime_ns, text.stat().st_mtime_ns))
    open_dataset(text, tokenizer)
    message = "was encoded from story.txt, not from story.md" if content else "story.md is empty"
    with pytest.raises(UserError, match=message):
        open_dataset(other, tokenizer)


def test_touched_or_renamed_text_is_accepted(text, tokenizer):
    first = open_dataset(text, tokenizer)
    os.utime(text, ns=(0, 0))
    assert open_dataset(text, tokenizer).header == first.header
    renamed = text.rename(text.with_suffix(".md"))
    assert open_dataset(renamed, tokenizer).header == first.header


def test_missing_text_is_accepted_only_under_its_own_name(text, tokenizer):
    first = open_dataset(text, tokenizer)
    text.unlink()
    assert open_dataset(text, tokenizer).header == first.header
    with pytest.raises(UserError, match=r"story.md does not exist"):
        open_dataset(text.with_suffix(".md"), tokenizer)


def test_token_file_without_a_text_is_rejected_for_a_text(tmp_path, tokenizer):
    text = tmp_path / "a.txt"
    text.write_text("the cat")
    write_tokens(tmp_path / "a.tokens", [np.arange(9)], tokenizer.vocab_size, tokenizer.fingerprint)
    assert len(open_dataset(tmp_path / "a.tokens", tokenizer)) == 9
    with pytest.raises(UserError, match=r"a.tokens was encoded from another a.txt"):
        open_dataset(text, tokenizer)


def test_missing_and_empty_texts_are_rejected(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no.txt does not exist: make a corpus"):
        open_dataset(tmp_path / "no.txt", tokenizer)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        open_dataset(tmp_path / "empty.txt", tokenizer)
    with pytest.raises(UserError, match=r"token file .*no.tokens does not exist"):
        open_dataset(tmp_path / "no.tokens", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_check_tokens(dataset):
    check_tokens(dataset, vocab_size=1000, context_length=999)
    with pytest.raises(UserError, match=r"vocabulary of 1000 tokens: the model supports 999; set --model.vocab-size 1000"):
        check_tokens(dataset, 999, 16)
    with pytest.raises(UserError, match=r"has 1000 tokens: at least 1000 \+ 1 are needed"):
        check_tokens(dataset, 1000, 1000)
