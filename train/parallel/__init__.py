"""A model spread over the processes of a job: whole in each (DDP), in shards (FSDP2), by layers (TP) and sequences (CP)."""

from .checkpoints import open_writer
from .spread import compile_blocks, exchanging_gradients, forget_gathered, place, spread, whole

__all__ = [
    "compile_blocks",
    "exchanging_gradients",
    "forget_gathered",
    "open_writer",
    "place",
    "spread",
    "whole",
]
