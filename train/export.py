"""Runs as folders that `transformers` reads, and models from such folders: the weights with their tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..files import atomic_folder, require_absent
from ..model.huggingface import (
    GENERATION_FILE,
    choose_family,
    family_of_folder,
    write_model,
)
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..tokenizer.formats import save_huggingface
from .config import TrainConfig, load_config
from .folder import CONFIG_FILE, TOKENIZER_FILE
from .pretrained import is_huggingface_folder, load_text_model

_TOKENIZER_CONFIG, _CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def export_run(
    run: Path, to: Literal["hf"], out: Path | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write the run's newest model and its tokenizer in a format of others; return the new folder, by default RUN/hf.

    hf: the family of Hugging Face's that holds the model, for `AutoModelForCausalLM` and `AutoTokenizer` of transformers; that
    of the folder which the run began with, where it is still there. What such a folder has beside its weights goes on with it:
    the tokenizer, the chat template, the settings of generation. Of a vocabulary larger than our tokenizer's, only the
    tokenizer's ids are written. A model or a pattern that cannot be held is a `UserError`.
    """
    if to != "hf":
        raise UserError(f"format {to!r} is unknown: choose hf")
    config = load_config(run / CONFIG_FILE)
    family = choose_family(config.model, _family_of_init(config)).model_type
    folder = require_absent(out or run / to)
    text = load_text_model(run, "cpu")
    model, end = text.model, text.tokenizer.end_of_text_id
    theirs = _is_huggingface_tokenizer(run / TOKENIZER_FILE)
    with atomic_folder(folder) as temporary:
        write_model(
            model,
            temporary,
            dtype=dtype,
            family=family,
            vocab_size=None if theirs else min(text.tokenizer.vocab_size, model.config.vocab_size),
            begin_token=text.begin_tokens[0] if text.begin_tokens else end,
            end_tokens=text.end_tokens,
        )
        if theirs:
            shutil.copyfile(run / TOKENIZER_FILE, temporary / TOKENIZER_FILE)
        else:
            save_huggingface(temporary / TOKENIZER_FILE, Tokenizer.load(run / TOKENIZER_FILE).data)
        _write_tokenizer_config(temporary, None if end is None else END_OF_TEXT, model.config.context_length)
        for name in (_TOKENIZER_CONFIG, _CHAT_TEMPLATE, GENERATION_FILE):
            if (run / name).exists():
                shutil.copyfile(run / name, temporary / name)
    return folder


def _family_of_init(config: TrainConfig) -> str | None:
    # Two families can hold the same model, such as Mistral without windows, which is also a Llama.
    # A run may have begun with another run; a folder that took the place of one may name one that came of it.
    seen: set[Path] = set()
    init = config.init
    while init is not None and init not in seen and (init / CONFIG_FILE).is_file():
        if is_huggingface_folder(init):
            return family_of_folder(init)
        seen.add(init)
        init = load_config(init / CONFIG_FILE).init
    return None


def _is_huggingface_tokenizer(path: Path) -> bool:
    return isinstance(json.loads(path.read_text()).get("model"), dict)


def _write_tokenizer_config(folder: Path, end: str | None, context_length: int) -> None:
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
