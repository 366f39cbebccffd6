"""The commands `demo`, `train`, `sweep`, `export` and `checkpoint convert`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .options import Positional, parse


def demo(arguments: Sequence[str]) -> None:
    """Train a small model that writes stories, from raw text, on any machine in minutes."""
    from ..train.options import DemoConfig

    config = parse(DemoConfig, "demo", arguments, demo.__doc__)
    from ..train.demo import run_demo

    run_demo(config)


def train(arguments: Sequence[str]) -> None:
    """Train a model from a preset, or fine-tune one with --init FOLDER; options override the preset."""
    from ..train.command import run_train_command

    run_train_command(arguments, "tilewright train")


def sweep(arguments: Sequence[str]) -> None:
    """Train a preset at every point of a grid of options."""
    from ..train.command import run_sweep_command

    run_sweep_command(arguments, "tilewright sweep")


def export(
    run: Positional[Path],
    to: Literal["hf"] = "hf",
    out: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Export a run's model and tokenizer as a folder that transformers loads.

    Args:
        run: Folder of the run.
        to: Format; hf is the Hugging Face family that fits the model: Llama, Mistral, Qwen or Gemma.
        out: Folder to write; default: hf in the run's folder.
        dtype: Dtype of the weights.
    """
    from ..train.export import export_run

    print(f"wrote {export_run(run, to, out, dtype)}")


def checkpoint_convert(
    folder: Positional[Path],
    out: Positional[Path],
    num_shards: int | None = None,
    to: Literal["tilewright", "dcp"] = "tilewright",
) -> None:
    """Convert a checkpoint to single files, to shards, or to torch.distributed.checkpoint.

    Args:
        folder: A checkpoint, such as RUN/checkpoints/step-00000200, or a folder written with `--to dcp`.
        out: Folder to write.
        num_shards: Number of shards of each file; default: single files.
        to: Format; dcp is torch.distributed.checkpoint.
    """
    from ..train.checkpoint.convert import convert_checkpoint

    convert_checkpoint(folder, out, num_shards, to)
    print(f"wrote {out}")
