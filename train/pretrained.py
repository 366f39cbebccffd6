"""Load trained models and their tokenizers from run folders and Hugging Face folders."""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import require_file
from ..model import ModelConfig, TransformerLM
from ..model.huggingface import GENERATION_FILE, canonical, is_huggingface_folder, read_config, read_model
from ..model.huggingface import load_weights as load_huggingface_weights
from ..tokenizer import AnyTokenizer, read_tokenizer
from ..tokenizer.formats import template_prefix
from ..tokenizer.formats.tokenizer_data import read_object
from .checkpoint.reader import load_weights
from .config import CONFIG_FILE, TOKENIZER_FILE, holds_run, load_config
from .data.record import recorded_tokenizer
from .device import resolve_device
from .folder import DATA_FILE, find_newest_valid, read_data_record

_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class TextModel:
    """A model, its tokenizer, and the tokens that begin and end a text."""

    model: TransformerLM
    tokenizer: AnyTokenizer
    begin_tokens: tuple[int, ...] = ()
    """Ids to put before every text, such as Llama 3's begin-of-text."""
    end_tokens: tuple[int, ...] = ()
    """Ids of which any one ends a text."""

    @property
    def num_ids(self) -> int:
        """Number of ids that both the tokenizer and the model have; either of the two can have more."""
        return min(self.tokenizer.vocab_size, self.model.config.vocab_size)


def load_run(run: Path, device: str = "auto", tokenizer_file: Path | None = None) -> tuple[TransformerLM, AnyTokenizer]:
    """Return the model of the run's newest valid checkpoint and its tokenizer; use the averaged weights if the run has them."""
    config = load_config(run / CONFIG_FILE)
    tokenizer = load_run_tokenizer(run, tokenizer_file)
    part = "ema" if config.keeps_mean else "model"
    checkpoint = find_newest_valid(run, [part])
    model = TransformerLM(config.model).to(resolve_device(device))
    load_weights(checkpoint, model, part)
    return model.eval(), tokenizer


def load_run_tokenizer(run: Path, file: Path | None = None) -> AnyTokenizer:
    """Return the tokenizer in `file`, by default the run's own; raise a `UserError` if the run was trained with another one."""
    path = file or run / TOKENIZER_FILE
    trained_with = load_config(run / CONFIG_FILE).data.tokenizer
    remedy = f"copy {trained_with} there, or resume the run, which copies it"
    if file is not None:
        remedy = f"expected the tokenizer that the run was trained with, {trained_with}"
    tokenizer = read_tokenizer(require_file(path, "the run's tokenizer", remedy))
    # The data record is missing if a run was copied partially.
    known = recorded_tokenizer(read_data_record(run)) if (run / DATA_FILE).exists() else None
    if known not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{path} is not the tokenizer that the run was trained with, or it has a custom pattern and the version of the "
            f"regex package has changed: {remedy}"
        )
    return tokenizer


def load_text_model(folder: Path, device: str = "auto", tokenizer_file: Path | None = None) -> TextModel:
    """Return the model and tokenizer in a run's folder (newest valid checkpoint) or in a Hugging Face folder.

    The begin and end tokens are read from `generation_config.json`, `tokenizer_config.json`, `config.json` and the template in
    `tokenizer.json`, as far as these exist; a run that started from a Hugging Face folder has copies of them. Raise a
    `UserError` if a file is missing or malformed, or if the tokenizer has more ids than the model.
    """
    if tokenizer_file is None and holds_run(folder) and not (folder / TOKENIZER_FILE).exists():
        copy = "" if is_huggingface_folder(folder) else f"copy {load_config(folder / CONFIG_FILE).data.tokenizer} there, or "
        raise UserError(f"{folder} has no {TOKENIZER_FILE}: {copy}choose a tokenizer with --tokenizer")
    file = tokenizer_file or folder / TOKENIZER_FILE
    if not is_huggingface_folder(folder):
        model, tokenizer = load_run(folder, device, tokenizer_file)
        return TextModel(model, tokenizer, *text_bounds(folder, tokenizer, model.config.vocab_size, file))
    # Read before the weights, so that errors appear early.
    vocab_size = read_config(folder).vocab_size
    tokenizer = read_tokenizer(file)
    check_ids(tokenizer, vocab_size, folder)
    bounds = text_bounds(folder, tokenizer, vocab_size, file)
    return TextModel(read_model(folder).to(resolve_device(device)), tokenizer, *bounds)


@torch.no_grad()
def initialise(model: TransformerLM, folder: Path, tokenizer: AnyTokenizer) -> None:
    """Copy the weights of a run or a Hugging Face folder into `model`. The context length may differ.

    `tokenizer` is the tokenizer of the training data. Raise a `UserError` if the shapes or the tokenizers differ. Warn if the
    tokenizer of a Hugging Face folder is missing or cannot be read.
    """
    huggingface = is_huggingface_folder(folder)
    shape = read_config(folder) if huggingface else load_config(folder / CONFIG_FILE).model
    _require_same_shape(folder, shape, model.config)
    try:
        known = read_tokenizer(folder / TOKENIZER_FILE) if huggingface else load_run_tokenizer(folder)
    except UserError as error:
        if not huggingface:
            raise
        warnings.warn(f"cannot compare the tokenizer with the one of {folder}: {error}", stacklevel=2)
    else:
        if known.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the model in {folder} was trained with another tokenizer: use {folder / TOKENIZER_FILE}")
    if huggingface:
        load_huggingface_weights(model, folder)
    else:
        model.load_state_dict(load_run(folder, "cpu")[0].state_dict())


def check_ids(tokenizer: AnyTokenizer, vocab_size: int, folder: Path) -> None:
    """Raise a `UserError` if the tokenizer has an id of `vocab_size` or more.

    Special tokens are exempt: Gemma 3's tokenizer has an image token that its text model lacks.
    """
    special = set(tokenizer.special_tokens.values())
    beyond = next((id for id in tokenizer.vocab if id >= vocab_size and id not in special), None)
    if beyond is not None:
        raise UserError(
            f"the tokenizer of {folder} has ids up to {tokenizer.vocab_size - 1}, such as {beyond} for "
            f"{tokenizer.vocab[beyond].decode(errors='replace')!r}: expected ids below the model's vocab_size, {vocab_size}"
        )


def text_bounds(
    folder: Path, tokenizer: AnyTokenizer, vocab_size: int, tokenizer_file: Path | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids to put before every text, and the ids that end a text; raise a `UserError` for ids the model lacks."""
    bounds = _begin_tokens(folder, tokenizer, tokenizer_file or folder / TOKENIZER_FILE), _end_tokens(folder, tokenizer)
    for what, ids in zip(("begins", "ends"), bounds, strict=True):
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"a text {what} with id {max(ids)} in {folder}: expected an id below the model's vocab_size, {vocab_size}"
            )
    return bounds


def _begin_tokens(folder: Path, tokenizer: AnyTokenizer, file: Path) -> tuple[int, ...]:
    """Return the ids before every text: `bos_token` if `add_bos_token` is true; if it is missing, those of the template."""
    config = _read(folder / _TOKENIZER_CONFIG)
    added = config.get("add_bos_token")
    if added is None:
        return template_prefix(_read(file), file) if file.suffix == ".json" else ()
    if added is not True:
        return ()
    id = _special_id(config, "bos_token", folder, tokenizer)
    return () if id is None else (id,)


def _end_tokens(folder: Path, tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Return the ids that end a text, from the first file that has any; the default is `<|endoftext|>`."""
    # generation_config.json is more complete: Llama 3's chat models have three end tokens.
    for name in (GENERATION_FILE, CONFIG_FILE):
        value = _read(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise UserError(f"{folder / name} has eos_token_id {json.dumps(value)}: expected an id or a list of ids")
        return tuple(dict.fromkeys(ids))
    id = _special_id(_read(folder / _TOKENIZER_CONFIG), "eos_token", folder, tokenizer)
    id = tokenizer.end_of_text_id if id is None else id
    return () if id is None else (id,)


def _special_id(config: dict[str, Any], name: str, folder: Path, tokenizer: AnyTokenizer) -> int | None:
    """Return the id of the special token `name` of `tokenizer_config.json`, or None if it is not set."""
    token = config.get(name)
    # The value is a string, or an object with the string in `content`.
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if text not in tokenizer.special_tokens:
        raise UserError(f"{folder / _TOKENIZER_CONFIG} has {name} {text!r}: expected a special token of {TOKENIZER_FILE}")
    return tokenizer.special_tokens[text]


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if the file does not exist."""
    return read_object(path) if path.exists() else {}


def _require_same_shape(folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    found, wanted = _fields(ours), _fields(theirs)
    different = [name for name, value in wanted.items() if value != found[name] and name != "context_length"]
    if ours.rope_scaling.kind != "default":
        # The user set RoPE scaling to extend the context, so it may differ.
        different = [name for name in different if not name.startswith("rope_scaling.")]
    if different:
        differences = ", ".join(f"{name} {wanted[name]}, not {found[name]}" for name in different)
        options = " ".join(f"--model.{name.replace('_', '-')} {wanted[name]}" for name in different)
        raise UserError(f"the model in {folder} has {differences}: omit the preset, or set {options}")


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(canonical(config))
    scaling = fields.pop("rope_scaling")
    return fields | {f"rope_scaling.{name}": value for name, value in scaling.items()}
