"""Parsing of command-line arguments with tyro."""

from collections.abc import Callable, Sequence
from typing import Any

import tyro

Positional = tyro.conf.Positional


def parse(target: Callable[..., Any], name: str, arguments: Sequence[str], description: str | None = None) -> Any:
    """Call `target`, a function or a dataclass, with the options that it declares, and return the result.

    `name` is the subcommand; `description`, by default the docstring of `target`, begins its help. Exits with status 0 for
    --help, and with status 2 for an unknown option or a value of the wrong type.
    """
    return tyro.cli(target, prog=f"tilewright {name}", args=list(arguments), description=description)
