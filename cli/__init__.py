"""The command `tilewright`; each file holds one subcommand or a few related ones.

Commands import what they need when they run, after their arguments are parsed: help and argument errors import no torch.
"""

from .entry import main

__all__ = ["main"]
