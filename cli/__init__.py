"""The command `tilewright`: one subcommand for each thing a person does, in a file for each kind of thing.

Most subcommands are functions whose typed arguments tyro turns into options; those whose options come from dataclasses of
rooms that import torch parse their arguments themselves. All import what they need when they run, so that neither
`tilewright --help` nor the help of whatever makes corpora and tokenizers waits for torch.
"""

from typing import TYPE_CHECKING, Any

from .entry import main

if TYPE_CHECKING:
    from .command_line import COMMANDS

__all__ = ["COMMANDS", "main"]


def __getattr__(name: str) -> Any:
    # The table needs tyro, which may be missing where the doctor is asked why.
    if name != "COMMANDS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .command_line import COMMANDS

    return COMMANDS
