"""Export a run's model and tokenizer to the Hugging Face format."""

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
    is_huggingface_folder,
    write_model,
)
from ..tokenizer import END_OF_TEXT, Tokenizer
from ..tokenizer.formats import save_huggingface
from .config import CONFIG_FILE, TOKENIZER_FILE, TrainConfig, load_config
from .pretrained import load_text_model

_TOKENIZER_CONFIG, _CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def export_run(
    run: Path, to: Literal["hf"], out: Path | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write the run's newest model and its tokenizer in another format; return the new folder, by default RUN/hf.

    `hf` is the format of `AutoModelForCausalLM` and `AutoTokenizer` in transformers. The model family is that of the Hugging
    Face folder the run began with, if that folder still exists; otherwise a family that can represent the model. A tokenizer,
    chat template and generation config from such a folder are copied. With our own tokenizer, embedding rows beyond its
    vocabulary are dropped. Raise a `UserError` if no family can represent the model, or if the format cannot represent the
    tokenizer.
    """
    if to != "hf":
        raise UserError(f"format is {to!r}: expected hf")
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
    # Two families can represent the same model: Mistral without windows is also a Llama.
    # Follow the chain of `init` folders. It can contain a cycle if a folder was replaced by a later run.
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
        # Without a class, transformers uses the Llama tokenizer for Llama models.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
    }
    (folder / _TOKENIZER_CONFIG).write_text(json.dumps(document, indent=2) + "\n")
