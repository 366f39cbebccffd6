"""The `train` and `sweep` commands, which start from a preset or from the weights in a folder."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import UserError
from .config import CONFIG_FILE, Extend, Resume, TrainConfig, holds_run, load_config
from .distributed import is_first_process
from .presets import PRESETS, finetuning, preset
from .sweep import SweepConfig


def _usage(program: str, purpose: str) -> str:
    lines = [f"usage: {program} PRESET [OPTIONS]", f"       {program} --init FOLDER [OPTIONS]", "", purpose]
    lines += ["FOLDER contains a run or a Hugging Face model, which is fine-tuned.", "", "presets:"]
    for name, config in PRESETS.items():
        shape = config.model
        size = f"{shape.num_layers} layers of {shape.d_model}, {shape.num_heads} heads, vocabulary {shape.vocab_size:,}"
        lines.append(f"  {name:16} {size}; {config.steps:,} steps of {config.tokens_per_step:,} tokens")
    return "\n".join([*lines, "", f"{program} PRESET --help lists the options; they override the values of the preset."])


def _begin(arguments: Sequence[str], program: str) -> tuple[str, TrainConfig, Sequence[str]]:
    """Return the name of the command for its help, the base configuration, and the options that override it."""
    if not arguments[0].startswith("-"):
        return f"{program} {arguments[0]}", preset(arguments[0]), arguments[1:]
    if folder := _given("--init", arguments):
        return f"{program} --init {folder}", finetuning(Path(folder)), arguments
    raise UserError(f"the first argument is {arguments[0]}: expected --init FOLDER or a preset: {', '.join(PRESETS)}")


def _stored(base: TrainConfig, options: Sequence[str]) -> TrainConfig | None:
    """Return the configuration of the run that the options resume, or None if they resume no run."""
    out = Path(_given("--out", options) or base.out)
    if _given("--resume", options) in (None, "None") or not holds_run(out):
        return None
    # The folder may have been moved.
    return dataclasses.replace(load_config(out / CONFIG_FILE), out=out)


def _given(name: str, options: Sequence[str]) -> str | None:
    """Return the value of an option on the command line, or None if it is not given."""
    found = None
    for option, following in itertools.pairwise([*options, ""]):
        given, equals, value = option.partition("=")
        if given == name:
            found = value if equals else following
    return found


def _asks_for_usage(arguments: Sequence[str]) -> bool:
    return not arguments or arguments[0] in ("-h", "--help")


def run_train_command(arguments: Sequence[str], program: str) -> None:
    """Parse `PRESET [OPTIONS]` or `--init FOLDER [OPTIONS]`, train, and print the result.

    `program` is the command that precedes the arguments, for the help.
    """
    if _asks_for_usage(arguments):
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
                config: Options of the run.
                resume: Resume the run in --out from a checkpoint; auto: from the newest valid one, or start a run.
                extend: With --resume: keep allows a new --batch-size or --data.train; a number also restarts the schedule.
                accept_valid: With --resume, allow other validation data, whose losses are not comparable.
                profile: Profile a few steps, write a trace to the run's folder, and print the time by kernel group.
            """
            return config, resume, extend, accept_valid, profile

        return tyro.cli(command, prog=name, args=list(options), console_outputs=is_first_process())

    # A resumed run starts from its stored configuration, not from the preset.
    config, resume, extend, accept_valid, profile = parse(_stored(base, options) or base)
    from .run import train

    try:
        result = train(config, resume=resume, extend=extend, accept_valid=accept_valid, profile=profile)
    except KeyboardInterrupt:
        print(f"\nresume the run in {config.out} from its newest checkpoint with --resume auto", file=sys.stderr)
        raise
    if not is_first_process():
        return
    if result.stopped_by:
        print(f"{result.run}: stopped by {result.stopped_by} after step {result.steps:,}; resume with --resume auto")
        return
    print(
        f"{result.run}: validation loss {result.valid_loss:.4f} ({result.valid_bits_per_byte:.4f} bits/byte) after "
        f"{result.steps:,} steps at "
        f"{result.tokens_per_second:,.0f} tokens/s; next: tilewright generate {result.run}"
    )


def run_sweep_command(arguments: Sequence[str], program: str) -> None:
    """Parse `PRESET --grid ... [OPTIONS]` or `--init FOLDER --grid ... [OPTIONS]`, run the sweep, and print a table."""
    if _asks_for_usage(arguments):
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
            config: Options of all runs.
        """
        return config, grid

    config, grid = tyro.cli(command, prog=name, args=list(options))
    from rich.console import Console

    from ..tables import print_table
    from .sweep import sweep, sweep_table

    result = sweep(config, grid)
    print_table(Console(), sweep_table(result))
    rest = "" if result.complete else "; repeat the command to run the rest"
    plot = result.out / "sweep.png"
    print(f"{result.out}: {len(result.points)} points{f'; curves in {plot}' if plot.exists() else ''}{rest}")
