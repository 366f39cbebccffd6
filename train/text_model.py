"""A model with its tokenizer, from the folder of a run or one in Hugging Face's manner: what reads and writes texts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model import TransformerLM
from ..model.huggingface import CONFIG_FILE as HUGGINGFACE_CONFIG_FILE
from ..model.huggingface import GENERATION_FILE, read_config, read_model
from ..tokenizer import AnyTokenizer, read_tokenizer
from ..tokenizer.formats import template_prefix
from ..tokenizer.formats.tokenizer_data import read_object
from .device import resolve_device
from .folder import TOKENIZER_FILE
from .run import load_run

_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class TextModel:
    """A model, its tokenizer, and the tokens that bound a text of it."""

    model: TransformerLM
    tokenizer: AnyTokenizer
    begin_tokens: tuple[int, ...] = ()
    """Ids that stand before every text, such as Llama 3's begin-of-text."""
    end_tokens: tuple[int, ...] = ()
    """Ids each of which ends a text."""

    @property
    def num_ids(self) -> int:
        """Ids from 0 to one less are those that the tokenizer knows and the model has rows for, which may be more or less."""
        return min(self.tokenizer.vocab_size, self.model.config.vocab_size)


def is_huggingface_folder(folder: Path) -> bool:
    """Return whether the folder's `config.json` is that of a model in Hugging Face's manner, not that of a run."""
    try:
        return "model_type" in json.loads((folder / HUGGINGFACE_CONFIG_FILE).read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_text_model(folder: Path, device: str = "auto") -> TextModel:
    """Return the model in a run's folder, of its newest valid checkpoint, or in a folder in Hugging Face's manner.

    What bounds a text is read from `generation_config.json`, `tokenizer_config.json`, the model's `config.json` and the
    template in `tokenizer.json`, whichever of them say it; a run that began with a folder of Hugging Face's holds copies. A
    file that is missing or malformed, and a tokenizer of more ids than the model has, raise a `UserError`.
    """
    if not is_huggingface_folder(folder):
        model, tokenizer = load_run(folder, device)
        return TextModel(model, tokenizer, *text_bounds(folder, tokenizer, model.config.vocab_size))
    # Before the weights, because what cannot be read is then known at once.
    vocab_size = read_config(folder).vocab_size
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    check_ids(tokenizer, vocab_size, folder)
    bounds = text_bounds(folder, tokenizer, vocab_size)
    return TextModel(read_model(folder).to(resolve_device(device)), tokenizer, *bounds)


def check_ids(tokenizer: AnyTokenizer, vocab_size: int, folder: Path) -> None:
    """Raise a `UserError` where an id of the tokenizer is none of the model's `vocab_size`.

    Special tokens may be: the text model of Gemma 3 lacks that of images, which its tokenizer has.
    """
    special = set(tokenizer.special_tokens.values())
    beyond = next((id for id in tokenizer.vocab if id >= vocab_size and id not in special), None)
    if beyond is not None:
        raise UserError(
            f"the tokenizer of {folder} has ids up to {tokenizer.vocab_size - 1}, such as {beyond} for "
            f"{tokenizer.vocab[beyond].decode(errors='replace')!r}, but the model has {vocab_size}: each needs a row"
        )


def text_bounds(folder: Path, tokenizer: AnyTokenizer, vocab_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before every text and those that end one; one that the model lacks raises a `UserError`."""
    bounds = _begin_tokens(folder, tokenizer), _end_tokens(folder, tokenizer)
    for what, ids in zip(("begins", "ends"), bounds, strict=True):
        if ids and max(ids) >= vocab_size:
            raise UserError(f"in {folder} a text {what} with the id {max(ids)}, but the model has {vocab_size} ids")
    return bounds


def _begin_tokens(folder: Path, tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Return the ids before every text: `bos_token` where `add_bos_token` says so, else what the template puts there."""
    config, path = _read(folder / _TOKENIZER_CONFIG), folder / TOKENIZER_FILE
    added = config.get("add_bos_token")
    if added is None:
        return template_prefix(_read(path), path)
    if added is not True:
        return ()
    id = _special_id(config, "bos_token", folder, tokenizer)
    return () if id is None else (id,)


def _end_tokens(folder: Path, tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Return the ids that end a text: those of the first file that names any, or `<|endoftext|>` where none does."""
    # The first file is generation's own, and says more: Llama 3's chat models end at three tokens.
    for name in (GENERATION_FILE, HUGGINGFACE_CONFIG_FILE):
        value = _read(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise UserError(f"{folder / name} has eos_token_id {json.dumps(value)}: it must be an id or a list of ids")
        return tuple(dict.fromkeys(ids))
    id = _special_id(_read(folder / _TOKENIZER_CONFIG), "eos_token", folder, tokenizer)
    id = tokenizer.end_of_text_id if id is None else id
    return () if id is None else (id,)


def _special_id(config: dict[str, Any], name: str, folder: Path, tokenizer: AnyTokenizer) -> int | None:
    """Return the id of a special token that `tokenizer_config.json` names, or None where it names none."""
    token = config.get(name)
    # As an object, it says how it is found in a text too.
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if text not in tokenizer.special_tokens:
        raise UserError(f"{folder / _TOKENIZER_CONFIG} has {name} {text!r}, which is no special token of {TOKENIZER_FILE}")
    return tokenizer.special_tokens[text]


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} where there is no file."""
    return read_object(path) if path.exists() else {}
