"""Opening of the datasets of a run: encodes texts where necessary, and checks datasets against the model."""

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
    """Return the training sources and the validation file. Encodes them first where necessary; see `open_dataset`."""
    template = ChatTemplate.load(config.tokenizer.parent, config.chat_template)
    train = tuple(open_dataset(path, tokenizer, template) for path in config.train)
    return train, open_dataset(config.valid, tokenizer, template)


def open_source_valid(config: DataConfig, tokenizer: AnyTokenizer) -> tuple[TokenDataset, ...]:
    """Return the validation file of each source. Encodes it first where necessary; see `open_dataset`."""
    template = ChatTemplate.load(config.tokenizer.parent, config.chat_template)
    return tuple(open_dataset(path, tokenizer, template) for path in config.source_valid or ())


def open_dataset(path: Path, tokenizer: AnyTokenizer, template: ChatTemplate | None = None) -> TokenDataset:
    """Open a token file, or the token file next to a text or chats. Encodes the text or the chats if that file is missing.

    A folder, an index or a glob of token files is opened as one `ShardedDataset`. So is a folder or a glob of texts: its shards
    are in `default_folder(path)`. Remote paths are fetched first; see `local`. See `open_encoded` and `find_shards` for the
    errors.
    """
    path = local(path)
    if (shards := find_shards(path)) is not None:
        datasets = [open_tokens(shard, tokenizer, template) for shard in shards]
        check_index(datasets)
        return ShardedDataset(path, datasets)
    if path.is_dir() or (glob.has_magic(str(path)) and not path.exists()):
        # No index for a glob: two globs may share a folder, and an index would list the shards of one only.
        shards = encode_shards([path], default_folder(path), tokenizer, template, indexed=path.is_dir())
        return ShardedDataset(path, shards)
    if path.suffix == ENDING:
        return open_tokens(path, tokenizer, template)
    return open_encoded(path, path.with_suffix(ENDING), tokenizer, template)


def check_tokens(dataset: TokenDataset, vocab_size: int, context_length: int) -> None:
    """Raise a `UserError` if a model of this vocabulary and context cannot be trained on `dataset`."""
    header = dataset.header
    if header.vocab_size > vocab_size:
        raise UserError(
            f"{dataset.path} has a vocabulary of {header.vocab_size} tokens: the model supports {vocab_size}; "
            f"set --model.vocab-size {header.vocab_size}"
        )
    require_length(dataset, context_length)
