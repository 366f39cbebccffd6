"""Activation checkpointing: blocks that save only their inputs in training and are recomputed in the backward pass."""

from typing import Literal

from ..errors import UserError

Checkpointing = Literal["none", "block"] | int
"""Blocks to checkpoint (Chen et al. 2016): none, every block, or the first N blocks.

The first blocks are the best choice: when the backward pass reaches them, the activations of the later blocks are freed, so
recomputation does not raise the peak.
"""


def num_checkpointed_blocks(checkpointing: Checkpointing, num_layers: int) -> int:
    """Return the number of first blocks to checkpoint. Raises a `UserError` if `checkpointing` is not valid for the model."""
    if checkpointing == "none":
        return 0
    if checkpointing == "block":
        return num_layers
    # isinstance would accept bool.
    if type(checkpointing) is not int or not 0 <= checkpointing <= num_layers:
        raise UserError(f"checkpointing is {checkpointing!r}: expected none, block, or a number of blocks up to {num_layers}")
    return checkpointing
