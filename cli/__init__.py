"""The command `tilewright`: one subcommand for each thing a person does, in a file for each kind of thing.

Most subcommands are functions whose typed arguments tyro turns into options; those whose options come from dataclasses of
rooms that import torch parse their arguments themselves. All import what they need when they run, so that neither
`tilewright --help` nor the help of whatever makes corpora and tokenizers waits for torch.
"""

from .entry import main

__all__ = ["main"]
