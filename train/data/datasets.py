"""The data of a run: its texts encoded and opened, checked against the model, read in batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import UserError
from ...files import require_file
from ...tokenizer import Tokenizer
from ...tokenizer.text.sources import text_bytes
from ..config import DataConfig
from .encoding import encode_text, text_sha256
from .sampling import inputs_and_targets, require_length
from .token_file import FileStamp, TokenDataset

ENDING = ".tokens"


def open_data(config: DataConfig, tokenizer: Tokenizer) -> tuple[tuple[TokenDataset, ...], TokenDataset]:
    """Return the training files and the validation file, encoded first where that was not done; see `open_dataset`."""
    train = tuple(open_dataset(path, tokenizer) for path in config.train)
    return train, open_dataset(config.valid, tokenizer)


def open_dataset(path: Path, tokenizer: Tokenizer) -> TokenDataset:
    """Open a token file, or the token file beside a text, which is encoded first where it is missing.

    A token file of another tokenizer or another text is a `UserError`: it is never overwritten. Whether the text is the same
    is told by its name, size and time, and by its hash where these differ.
    """
    tokens = path if path.suffix == ENDING else path.with_suffix(ENDING)
    if path != tokens and not tokens.exists():
        encode_text(path, tokenizer, tokens)
    dataset = TokenDataset(tokens)
    if dataset.header.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{tokens} was made by another tokenizer, or, if the pattern is a regular expression, with another version of"
            " regex: remove it to have it made again, or name its tokenizer"
        )
    if path != tokens:
        _check_text(path, dataset)
    return dataset


def _check_text(text: Path, dataset: TokenDataset) -> None:
    stamp, header = dataset.header.text_file, dataset.header
    if stamp is not None and stamp.name == text.name and not text.exists():
        # A text that is encoded is no longer needed.
        return
    require_file(text, "text file")
    if FileStamp.of(text) == stamp:
        return
    if text_bytes(text) not in (None, header.text_bytes) or text_sha256(text) != header.text_sha256:
        if stamp is None or stamp.name == text.name:
            raise UserError(f"{dataset.path} was made from another {text.name}: remove it to have it made again")
        raise UserError(f"{dataset.path} was made from {stamp.name}, not from {text.name}: name one of the texts differently")


def check_fits(dataset: TokenDataset, vocab_size: int, context_length: int) -> None:
    """Raise a `UserError` where a model of this vocabulary and context cannot read `dataset`."""
    header = dataset.header
    if header.vocab_size > vocab_size:
        raise UserError(
            f"{dataset.path} has a vocabulary of {header.vocab_size} tokens, the model one of {vocab_size}: "
            f"set --model.vocab-size {header.vocab_size}"
        )
    require_length(dataset, context_length)


def validation_batches(
    dataset: TokenDataset, num_sequences: int, batch_size: int, context_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `num_sequences` sequences that cover the file evenly, each place at most once: the same ones every time."""
    num_sequences = min(num_sequences, (len(dataset) - 1) // context_length)
    starts = np.linspace(0, len(dataset) - context_length - 1, num_sequences).astype(np.int64)
    for first in range(0, num_sequences, batch_size):
        yield inputs_and_targets(dataset.windows(starts[first : first + batch_size], context_length + 1))
