"""Activation checkpointing: blocks that keep only their inputs in training, and run again in the backward pass."""

from typing import Literal

from ..errors import UserError

Checkpointing = Literal["none", "block"] | int
"""Which blocks are checkpointed (Chen et al. 2016): none, every block, or a number of them from the first on.

The first, because when the backward pass reaches them what the others kept is gone: running again adds nothing to the peak.
"""


def num_checkpointed_blocks(checkpointing: Checkpointing, num_layers: int) -> int:
    """Return how many of a model's blocks are checkpointed, from the first on; more than it has is a `UserError`."""
    if checkpointing == "none":
        return 0
    if checkpointing == "block":
        return num_layers
    # True is an int, but no number of blocks.
    if type(checkpointing) is not int or not 0 <= checkpointing <= num_layers:
        raise UserError(f"checkpointing is {checkpointing!r}: choose none, block, or a number of blocks, at most {num_layers}")
    return checkpointing
