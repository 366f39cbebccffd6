"""Models that are trained already, from the folder of a run or one in Hugging Face's manner, with their tokenizers."""

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
from ..model.huggingface import CONFIG_FILE as HUGGINGFACE_CONFIG_FILE
from ..model.huggingface import GENERATION_FILE, canonical, read_config, read_model
from ..model.huggingface import load_weights as load_huggingface_weights
from ..tokenizer import AnyTokenizer, read_tokenizer
from ..tokenizer.formats import template_prefix
from ..tokenizer.formats.tokenizer_data import read_object
from .checkpoint.reader import load_weights
from .config import load_config
from .data.record import recorded_tokenizer
from .device import resolve_device
from .folder import CONFIG_FILE, DATA_FILE, TOKENIZER_FILE, find_newest_valid, read_data_record

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


def load_run(run: Path, device: str = "auto") -> tuple[TransformerLM, AnyTokenizer]:
    """Return the model of the run's newest valid checkpoint, with the mean of its weights where it keeps one, and tokenizer."""
    config = load_config(run / CONFIG_FILE)
    tokenizer = load_run_tokenizer(run)
    part = "ema" if config.keeps_mean else "model"
    checkpoint = find_newest_valid(run, [part])
    model = TransformerLM(config.model).to(resolve_device(device))
    load_weights(checkpoint, model, part)
    return model.eval(), tokenizer


def load_run_tokenizer(run: Path) -> AnyTokenizer:
    """Return the tokenizer in a run's folder; one that the run was not trained with is a `UserError`."""
    path = run / TOKENIZER_FILE
    remedy = f"put {load_config(run / CONFIG_FILE).data.tokenizer} there, or resume the run, which does so"
    tokenizer = read_tokenizer(require_file(path, "the run's tokenizer", remedy))
    # A folder without a record is what is left of a run that was copied in part.
    known = recorded_tokenizer(read_data_record(run)) if (run / DATA_FILE).exists() else None
    if known not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{path} is not the tokenizer that the run was trained with, or, if its pattern is a regular expression, it is "
            f"read by another version of regex: {remedy}"
        )
    return tokenizer


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


@torch.no_grad()
def initialise(model: TransformerLM, folder: Path, tokenizer: AnyTokenizer) -> None:
    """Copy the weights of a run, or of a folder of Hugging Face's, into `model`, whose context may be of another length.

    `tokenizer` is the one of the texts to come. Another shape of the model, and another tokenizer, are a `UserError`; a
    tokenizer of the folder that cannot be read, or is not there, is a warning.
    """
    huggingface = is_huggingface_folder(folder)
    shape = read_config(folder) if huggingface else load_config(folder / CONFIG_FILE).model
    _require_same_shape(folder, shape, model.config)
    try:
        known = read_tokenizer(folder / TOKENIZER_FILE) if huggingface else load_run_tokenizer(folder)
    except UserError as error:
        if not huggingface:
            raise
        warnings.warn(f"whether the tokenizer is that of {folder} cannot be told: {error}", stacklevel=2)
    else:
        if known.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the model in {folder} was trained with another tokenizer: use {folder / TOKENIZER_FILE}")
    if huggingface:
        load_huggingface_weights(model, folder)
    else:
        model.load_state_dict(load_run(folder, "cpu")[0].state_dict())


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


def _require_same_shape(folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    found, wanted = _fields(ours), _fields(theirs)
    different = [name for name, value in wanted.items() if value != found[name] and name != "context_length"]
    if ours.rope_scaling.kind != "default":
        # One that is asked for: it stretches what the weights have learned over a longer context.
        different = [name for name in different if not name.startswith("rope_scaling.")]
    if different:
        differences = ", ".join(f"{name} {wanted[name]}, not {found[name]}" for name in different)
        options = " ".join(f"--model.{name.replace('_', '-')} {wanted[name]}" for name in different)
        raise UserError(f"the model in {folder} has {differences}: leave the preset out, or set {options}")


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(canonical(config))
    scaling = fields.pop("rope_scaling")
    return fields | {f"rope_scaling.{name}": value for name, value in scaling.items()}
