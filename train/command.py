"""The command that trains: by a preset or from a folder's weights, any setting given anew, alone or under torchrun."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ..errors import UserError
from .config import TrainConfig, load_config
from .distributed import is_first_process
from .extension import Extend
from .folder import CONFIG_FILE, Resume, holds_run
from .presets import PRESETS, finetuning, preset
from .run import train
from .sweep.grid import SweepConfig, sweep
from .sweep.result import sweep_table


def _usage(program: str, purpose: str) -> str:
    lines = [f"usage: {program} PRESET [OPTIONS]", f"       {program} --init FOLDER [OPTIONS]", "", purpose]
    lines += ["FOLDER is a run, or a model of Hugging Face's: what is trained is fine-tuned from it.", "", "presets:"]
    for name, config in PRESETS.items():
        shape = config.model
        size = f"{shape.num_layers} layers of {shape.d_model}, {shape.num_heads} heads, vocabulary {shape.vocab_size:,}"
        lines.append(f"  {name:16} {size}; {config.steps:,} steps of {config.tokens_per_step:,} tokens")
    return "\n".join([*lines, "", f"{program} PRESET --help shows the options; every setting of a preset can be given anew."])


def _begin(arguments: Sequence[str], program: str) -> tuple[str, TrainConfig, Sequence[str]]:
    """Return what the help calls the command, the settings that it begins with, and the options that change them."""
    if not arguments[0].startswith("-"):
        return f"{program} {arguments[0]}", preset(arguments[0]), arguments[1:]
    if folder := _given("--init", arguments):
        return f"{program} --init {folder}", finetuning(Path(folder)), arguments
    raise UserError(f"the arguments begin with {arguments[0]}: name a preset first, {', '.join(PRESETS)}, or --init FOLDER")


def _stored(base: TrainConfig, options: Sequence[str]) -> TrainConfig | None:
    """Return the settings of the run that the options resume, None where they resume none."""
    out = Path(_given("--out", options) or base.out)
    if _given("--resume", options) in (None, "None") or not holds_run(out):
        return None
    # The folder may have moved since.
    return dataclasses.replace(load_config(out / CONFIG_FILE), out=out)


def _given(name: str, options: Sequence[str]) -> str | None:
    """Return the value that the command line gives an option, None where it does not."""
    found = None
    for option, following in itertools.pairwise([*options, ""]):
        given, equals, value = option.partition("=")
        if given == name:
            found = value if equals else following
    return found


def _wants_usage(arguments: Sequence[str]) -> bool:
    return not arguments or arguments[0] in ("-h", "--help")


def run_train_command(arguments: Sequence[str], program: str) -> None:
    """Parse `PRESET [OPTIONS]` or `--init FOLDER [OPTIONS]`, train, and say what came of it.

    `program` is what the user typed before.
    """
    if _wants_usage(arguments):
        print(_usage(program, "Train a model."))
        return
    name, base, options = _begin(arguments, program)

    def parse(default: TrainConfig) -> tuple[TrainConfig, Resume | None, Extend | None, bool, bool]:
        def command(
            config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
            resume: Resume | None = None,
            extend: Extend | None = None,
            accept_valid: bool = False,
            profile: bool = False,
        ) -> tuple[TrainConfig, Resume | None, Extend | None, bool, bool]:
            """Train a model.

            Args:
                config: The run.
                resume: Go on with the run in --out by its own settings: from the checkpoint named, which must be valid, or
                    auto: from the newest valid one, or from the beginning where the folder holds no run.
                extend: With --resume, let options such as --steps, --batch-size and --data.train change from here on. keep: the
                    schedule goes on; a number: it begins anew, from this learning rate, and falls to the end of --steps. More
                    steps of schedules that are constant, or whose decay has not begun, need no --extend.
                accept_valid: Go on with other validation data than those of the run, whose losses do not compare with those
                    before; metrics.jsonl notes the step.
                profile: Record a few steps once compiled, write their trace to the run's folder, and say where their time went.
            """
            return config, resume, extend, accept_valid, profile

        return tyro.cli(command, prog=name, args=list(options), console_outputs=is_first_process())

    # Options of a run that goes on are checked against its own settings, not those of the preset.
    config, resume, extend, accept_valid, profile = parse(_stored(base, options) or base)
    try:
        result = train(config, resume=resume, extend=extend, accept_valid=accept_valid, profile=profile)
    except KeyboardInterrupt:
        print(f"\nthe run in {config.out} goes on from its newest checkpoint with --resume auto", file=sys.stderr)
        raise
    if not is_first_process():
        return
    if result.stopped_by:
        print(f"{result.run}: stopped by {result.stopped_by} after step {result.steps:,}; it goes on with --resume auto")
        return
    print(
        f"{result.run}: validation loss {result.valid_loss:.4f} ({result.valid_bits_per_byte:.4f} bits/byte) after "
        f"{result.steps:,} steps at "
        f"{result.tokens_per_second:,.0f} tokens/s; next: tilewright generate {result.run}"
    )


def run_sweep_command(arguments: Sequence[str], program: str) -> None:
    """Parse `PRESET --grid ... [OPTIONS]`, train at every point of the grid, and show the best.

    `--init FOLDER` may stand in place of the preset.
    """
    if _wants_usage(arguments):
        print(_usage(program, "Train a preset at every point of a grid of options."))
        return
    name, base, options = _begin(arguments, program)
    base = dataclasses.replace(base, out=base.out.with_name(f"{base.out.name}-sweep"))

    def command(
        grid: Annotated[SweepConfig, tyro.conf.arg(name="")], config: Annotated[TrainConfig, tyro.conf.arg(name="")] = base
    ) -> tuple[TrainConfig, SweepConfig]:
        """Train a preset at every point of a grid of options.

        Args:
            grid: The grid.
            config: What every run has in common.
        """
        return config, grid

    config, grid = tyro.cli(command, prog=name, args=list(options))
    result = sweep(config, grid)
    Console().print(sweep_table(result))
    rest = "" if result.complete else "; the same command goes on with the rest"
    print(f"{result.out}: {len(result.points)} points; curves in {result.out / 'sweep.png'}{rest}")
