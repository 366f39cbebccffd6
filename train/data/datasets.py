"""The data of a run: its texts encoded and opened, and checked against the model."""

import glob
from pathlib import Path

from ...errors import UserError
from ...tokenizer import AnyTokenizer
from ...tokenizer.chat_template import ChatTemplate
from ..config import DataConfig
from .encoded_file import open_encoded, open_tokens
from .remote import local
from .sampling import require_length
from .shard_encoding import default_folder, encode_shards
from .shards import ENDING, ShardedDataset, check_index, find_shards
from .token_file import TokenDataset


def open_data(config: DataConfig, tokenizer: AnyTokenizer) -> tuple[tuple[TokenDataset, ...], TokenDataset]:
    """Return the sources of training and the validation file, encoded first where that was not done; see `open_dataset`."""
    template = ChatTemplate.load(config.tokenizer.parent, config.chat_template)
    train = tuple(open_dataset(path, tokenizer, template) for path in config.train)
    return train, open_dataset(config.valid, tokenizer, template)


def open_source_valid(config: DataConfig, tokenizer: AnyTokenizer) -> tuple[TokenDataset, ...]:
    """Return the validation file of each source, encoded as those of `open_data`."""
    template = ChatTemplate.load(config.tokenizer.parent, config.chat_template)
    return tuple(open_dataset(path, tokenizer, template) for path in config.source_valid or ())


def open_dataset(path: Path, tokenizer: AnyTokenizer, template: ChatTemplate | None = None) -> TokenDataset:
    """Open a token file, or the token file beside a text or chats, which are encoded first where it is missing.

    A folder, an index or a glob of token files is one `ShardedDataset`, and so is a folder or a glob of texts, whose shards
    are made in the folder that `default_folder` gives. What is remote is fetched first (`local`). See `open_encoded` and
    `find_shards` for the errors.
    """
    path = local(path)
    if (shards := find_shards(path)) is not None:
        datasets = [open_tokens(shard, tokenizer, template) for shard in shards]
        check_index(datasets)
        return ShardedDataset(path, datasets)
    if path.is_dir() or (glob.has_magic(str(path)) and not path.exists()):
        # The shards of two globs can be in one folder, and an index be that of one of them alone.
        shards = encode_shards([path], default_folder(path), tokenizer, template, indexed=path.is_dir())
        return ShardedDataset(path, shards)
    if path.suffix == ENDING:
        return open_tokens(path, tokenizer, template)
    return open_encoded(path, path.with_suffix(ENDING), tokenizer, template)


def check_fits(dataset: TokenDataset, vocab_size: int, context_length: int) -> None:
    """Raise a `UserError` where a model of this vocabulary and context cannot read `dataset`."""
    header = dataset.header
    if header.vocab_size > vocab_size:
        raise UserError(
            f"{dataset.path} has a vocabulary of {header.vocab_size} tokens, the model one of {vocab_size}: "
            f"set --model.vocab-size {header.vocab_size}"
        )
    require_length(dataset, context_length)
