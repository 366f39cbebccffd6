"""The data of a run: its texts encoded and opened, checked against the model, read in batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import UserError
from ...files import require_file
from ...tokenizer import AnyTokenizer
from ...tokenizer.chat_template import ChatTemplate
from ...tokenizer.chats import holds_chats
from ...tokenizer.text.sources import text_bytes
from ..config import DataConfig
from .chats import chats_fingerprint, chats_sha256, encode_chats
from .encoding import encode_text, text_sha256
from .packing import ChatDataset, PackedWindows
from .sampling import inputs_and_targets, require_length
from .token_file import FileStamp, TokenDataset

ENDING = ".tokens"


def open_data(config: DataConfig, tokenizer: AnyTokenizer) -> tuple[tuple[TokenDataset, ...], TokenDataset]:
    """Return the training files and the validation file, encoded first where that was not done; see `open_dataset`."""
    template = ChatTemplate.load(config.tokenizer.parent, config.chat_template)
    train = tuple(open_dataset(path, tokenizer, template) for path in config.train)
    return train, open_dataset(config.valid, tokenizer, template)


def open_dataset(path: Path, tokenizer: AnyTokenizer, template: ChatTemplate | None = None) -> TokenDataset:
    """Open a token file, or the token file beside a text or chats, which are encoded first where it is missing.

    A token file of another tokenizer, another text or another template is a `UserError`: it is never overwritten. Whether the
    text is the same is told by its name, size and time, and by its hash where these differ.
    """
    tokens = path if path.suffix == ENDING else path.with_suffix(ENDING)
    if path != tokens and not tokens.exists():
        if holds_chats(path):
            encode_chats(path, tokenizer, _required(template, path), tokens)
        else:
            encode_text(path, tokenizer, tokens)
    dataset = TokenDataset(tokens)
    if dataset.header.marked:
        dataset = ChatDataset(tokens)
        if dataset.header.tokenizer != chats_fingerprint(tokenizer, _required(template, path)):
            raise UserError(f"{tokens} was made by another tokenizer or chat template: remove it to have it made again")
    elif dataset.header.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{tokens} was made by another tokenizer, or, if the pattern is a regular expression, with another version of"
            " regex: remove it to have it made again, or name its tokenizer"
        )
    if path != tokens:
        _check_text(path, dataset)
    return dataset


def _required(template: ChatTemplate | None, path: Path) -> ChatTemplate:
    if template is None:
        raise UserError(f"{path} has chats, and the tokenizer's folder no chat template: name one with --data.chat-template")
    return template


def _check_text(text: Path, dataset: TokenDataset) -> None:
    stamp, header = dataset.header.text_file, dataset.header
    if stamp is not None and stamp.name == text.name and not text.exists():
        # A text that is encoded is no longer needed.
        return
    require_file(text, "text file")
    if FileStamp.of(text) == stamp:
        return
    if header.marked:
        changed = chats_sha256(text) != header.text_sha256
    else:
        changed = text_bytes(text) not in (None, header.text_bytes) or text_sha256(text) != header.text_sha256
    if changed:
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
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `num_sequences` sequences that cover the file evenly, each place at most once: the same ones every time.

    Tensors are those of `TrainingData.batch`.
    """
    if isinstance(dataset, ChatDataset):
        windows = PackedWindows(dataset, context_length)
        places = np.linspace(0, len(windows) - 1, min(num_sequences, len(windows))).astype(np.int64)
        for first in range(0, len(places), batch_size):
            yield windows.read(windows.starts[places[first : first + batch_size]])
        return
    num_sequences = min(num_sequences, (len(dataset) - 1) // context_length)
    starts = np.linspace(0, len(dataset) - context_length - 1, num_sequences).astype(np.int64)
    for first in range(0, num_sequences, batch_size):
        yield inputs_and_targets(dataset.windows(starts[first : first + batch_size], context_length + 1))
