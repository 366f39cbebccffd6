"""Runs as folders that `transformers` reads, and models from such folders: the weights with their tokenizer."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Literal

import torch

from ..errors import UserError
from ..files import atomic_folder, require_absent
from ..model import TransformerLM
from ..model.interop import CONFIG_FILE as LLAMA_CONFIG_FILE
from ..model.interop import check_exportable, load_llama, load_llama_config, write_llama
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..tokenizer.formats import save_huggingface
from .config import load_config
from .device import resolve_device
from .folder import CONFIG_FILE, TOKENIZER_FILE
from .run import load_run

_TOKENIZER_CONFIG = "tokenizer_config.json"


def export_run(
    run: Path, to: Literal["hf"], out: Path | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write the run's newest model and its tokenizer in a format of others; return the new folder, by default RUN/hf.

    hf: Llama's format with `tokenizer.json`, for `AutoModelForCausalLM` and `AutoTokenizer` of transformers. Of a vocabulary
    larger than the tokenizer's, only the tokenizer's ids are written. A model or a pattern that the format cannot hold is a
    `UserError`.
    """
    if to != "hf":
        raise UserError(f"format {to!r} is unknown: choose hf")
    check_exportable(load_config(run / CONFIG_FILE).model)
    folder = require_absent(out or run / to)
    model, tokenizer = load_run(run, "cpu")
    with atomic_folder(folder) as temporary:
        size = min(tokenizer.vocab_size, model.config.vocab_size)
        write_llama(model, temporary, dtype=dtype, vocab_size=size, end_of_text_id=tokenizer.end_of_text_id)
        _write_tokenizer(tokenizer, temporary, model.config.context_length)
    return folder


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    save_huggingface(folder / TOKENIZER_FILE, tokenizer.data)
    end = END_OF_TEXT if tokenizer.end_of_text_id is not None else None
    document = {
        # Named, because for Llama's models that library would otherwise take Llama's own tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
    }
    (folder / _TOKENIZER_CONFIG).write_text(json.dumps(document, indent=2) + "\n")


def is_llama_folder(folder: Path) -> bool:
    """Return whether the folder's `config.json` is that of a model in Hugging Face's manner, not that of a run."""
    try:
        return "model_type" in json.loads((folder / LLAMA_CONFIG_FILE).read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_model(folder: Path, device: str = "auto") -> tuple[TransformerLM, Tokenizer]:
    """Return the model and the tokenizer of a run, or of a folder in Llama's format; see `load_run` and `load_llama`."""
    if not is_llama_folder(folder):
        return load_run(folder, device)
    # Before the weights, because what cannot be read is then known at once.
    load_llama_config(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    return load_llama(folder).to(resolve_device(device)), tokenizer


@torch.no_grad()
def initialise(model: TransformerLM, folder: Path, tokenizer: Tokenizer) -> None:
    """Copy the weights of a run, or of a folder in Llama's format, into `model`, whose context may be of another length.

    `tokenizer` is the one of the texts to come. Another shape of the model, and another tokenizer, are a `UserError`; a
    tokenizer of the folder that cannot be read, or is not there, is a warning.
    """
    llama = is_llama_folder(folder)
    shape = load_llama_config(folder) if llama else load_config(folder / CONFIG_FILE).model
    theirs, ours = (dataclasses.asdict(dataclasses.replace(c, num_kv_heads=c.kv_heads)) for c in (shape, model.config))
    for name, value in theirs.items():
        if name != "context_length" and value != ours[name]:
            raise UserError(
                f"the model in {folder} has {name} {value}, not {ours[name]}: set --model.{name.replace('_', '-')} {value}"
            )
    try:
        known = Tokenizer.load(folder / TOKENIZER_FILE)
    except UserError as error:
        if not llama:
            raise
        warnings.warn(f"whether the tokenizer is that of {folder} cannot be told: {error}", stacklevel=2)
    else:
        if known.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the model in {folder} was trained with another tokenizer: use {folder / TOKENIZER_FILE}")
    source = load_llama(folder) if llama else load_run(folder, "cpu")[0]
    model.load_state_dict(source.state_dict())
