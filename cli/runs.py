"""Runs: trained, and what they leave behind put to use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .options import Positional, parse


def demo(arguments: Sequence[str]) -> None:
    """Turn raw text into a model that writes stories, on any machine, in minutes."""
    from ..train.demo import DemoConfig, run_demo

    run_demo(parse(DemoConfig, "demo", arguments, demo.__doc__))


def train(arguments: Sequence[str]) -> None:
    """Train a model by a preset, or fine-tune one with --init FOLDER; any setting can be given anew."""
    from ..train.command import run_train_command

    run_train_command(arguments, "tilewright train")


def sweep(arguments: Sequence[str]) -> None:
    """Train a preset at every point of a grid of options; see `tilewright sweep --help`."""
    from ..train.command import run_sweep_command

    run_sweep_command(arguments, "tilewright sweep")


def export(
    run: Positional[Path],
    to: Literal["hf"] = "hf",
    out: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a run's model and tokenizer as a folder that transformers loads.

    Args:
        run: Folder of the run.
        to: The format; hf is the family of Hugging Face's that holds the model: Llama, Mistral, Qwen or Gemma.
        out: The new folder; by default hf in the run's.
        dtype: Of the weights.
    """
    from ..train.export import export_run

    print(f"wrote {export_run(run, to, out, dtype)}")


def checkpoint_convert(
    folder: Positional[Path],
    out: Positional[Path],
    num_shards: int | None = None,
    to: Literal["tilewright", "dcp"] = "tilewright",
) -> None:
    """Write a checkpoint again, as single files, in shards, or for torch.distributed.checkpoint.

    Args:
        folder: A checkpoint, such as RUN/checkpoints/step-00000200, or a folder that `--to dcp` has written.
        out: The new folder.
        num_shards: Shards of each file; by default single files.
        to: The format; dcp is that of torch.distributed.checkpoint.
    """
    from ..train.checkpoint.convert import convert_checkpoint

    convert_checkpoint(folder, out, num_shards, to)
    print(f"wrote {out}")
