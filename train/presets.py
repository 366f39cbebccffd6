"""Training runs that have names: a model's shape, where its data lies, and settings that suit both."""

from pathlib import Path

from ..errors import UserError
from ..model.config import MODELS
from .config import DataConfig, OptimizerConfig, TrainConfig


def corpus_files(folder: Path) -> DataConfig:
    """Return the files that `tilewright corpus` and `tilewright tokenizer train` leave in a corpus's folder."""
    return DataConfig((folder / "train.txt",), folder / "valid.txt", folder / "tokenizer.json")


def _gpt2(name: str, lr: float, micro_batch_size: int) -> TrainConfig:
    # Learning rates of Brown et al. 2020, table 2.1, for the nearest sizes; 0.5 M tokens a step, 10 B tokens in all.
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


def preset(name: str) -> TrainConfig:
    """Return the named preset; an unknown name is a `UserError` that lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
