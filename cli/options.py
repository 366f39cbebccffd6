"""Arguments of the command line turned into values, with a help text, by tyro."""

from collections.abc import Callable, Sequence
from typing import Any

import tyro

Positional = tyro.conf.Positional


def parse(target: Callable[..., Any], name: str, arguments: Sequence[str], description: str | None = None) -> Any:
    """Call `target`, a function or a dataclass, with the options that it declares, and return what it returns.

    `name` is the subcommand's; its help begins with `description`, by default the docstring of `target`. Exits with status 0
    for --help, and 2 for an option that is unknown or of another type.
    """
    return tyro.cli(target, prog=f"tilewright {name}", args=list(arguments), description=description)
