"""Presets: named training runs with a model, data and options; and the configuration of fine-tuning runs."""

import dataclasses
from pathlib import Path

from ..errors import UserError
from ..model.config import MODELS
from ..model.huggingface import is_huggingface_folder, read_config
from .config import CONFIG_FILE, TOKENIZER_FILE, DataConfig, OptimizerConfig, TrainConfig, load_config

# The context of Llama 2's fine-tuning (Touvron et al. 2023, section 3.1). Conversations are packed, so a longer context would
# mainly make attention more expensive.
_FINETUNING_CONTEXT = 4096


def corpus_files(folder: Path) -> DataConfig:
    """Return the files that `tilewright corpus` and `tilewright tokenizer train` write to the folder of a corpus."""
    return DataConfig((folder / "train.txt",), folder / "valid.txt", folder / "tokenizer.json")


def _gpt2(name: str, lr: float, micro_batch_size: int) -> TrainConfig:
    # Learning rates of the nearest sizes in Brown et al. 2020, table 2.1; 0.5 M tokens per step, 10 B tokens in total.
    return TrainConfig(
        out=Path("runs") / name,
        model=MODELS[name],
        data=corpus_files(Path("data/openwebtext")),
        steps=19_073,
        batch_size=512,
        micro_batch_size=micro_batch_size,
        optimizer=OptimizerConfig(lr=lr, final_lr=lr / 10, warmup_steps=700),
    )


PRESETS: dict[str, TrainConfig] = {
    "stories-cpu": TrainConfig(
        out=Path("runs/stories-cpu"),
        model=MODELS["stories-cpu"],
        data=corpus_files(Path("data/stories")),
        steps=800,
        batch_size=8,
        optimizer=OptimizerConfig(lr=8e-3, final_lr=8e-4, warmup_steps=30),
        log_every=10,
        eval_every=100,
        eval_sequences=128,
        sample_every=200,
        checkpoint_every=200,
    ),
    # CS336 assignment 1, section 7: 327.68 M tokens of TinyStories.
    "tinystories-17m": TrainConfig(
        out=Path("runs/tinystories-17m"),
        model=MODELS["tinystories-17m"],
        data=corpus_files(Path("data/tinystories")),
        steps=10_000,
        batch_size=128,
        optimizer=OptimizerConfig(lr=1e-3, final_lr=1e-4, warmup_steps=200),
    ),
    "gpt2-small": _gpt2("gpt2-small", 6e-4, 32),
    "gpt2-medium": _gpt2("gpt2-medium", 3e-4, 16),
    "gpt2-large": _gpt2("gpt2-large", 2.5e-4, 8),
    "gpt2-xl": _gpt2("gpt2-xl", 2e-4, 8),
}
"""Configuration of each preset, by name."""


def preset(name: str) -> TrainConfig:
    """Return the named preset; raise a `UserError` for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def finetuning(folder: Path) -> TrainConfig:
    """Return a fine-tuning run that starts from the weights, shape and tokenizer of a run or a Hugging Face folder.

    The context is the model's, at most 4,096 tokens. The data are chats. The optimizer options, 64 sequences per step, and a
    loss only on answers follow Llama 2's fine-tuning (Touvron et al. 2023, section 3.1).
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"init is {folder}, which has no {CONFIG_FILE}: expected the folder of a run or a Hugging Face model")
    model = read_config(folder) if is_huggingface_folder(folder) else load_config(folder / CONFIG_FILE).model
    chats = Path("data/chats")
    return TrainConfig(
        out=Path("runs") / f"{folder.resolve().name}-tuned",
        model=dataclasses.replace(model, context_length=min(model.context_length, _FINETUNING_CONTEXT)),
        data=DataConfig((chats / "train.jsonl",), chats / "valid.jsonl", folder / TOKENIZER_FILE),
        steps=1000,
        batch_size=64,
        micro_batch_size=1,
        optimizer=OptimizerConfig(lr=2e-5, final_lr=2e-6, warmup_steps=10),
        init=folder,
        eval_every=100,
        eval_sequences=128,
        checkpoint_every=200,
    )
