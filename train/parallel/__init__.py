"""Parallel training: replicated weights (DDP), sharded weights (FSDP2), divided layers (TP) and divided sequences (CP)."""

from .checkpoints import open_writer
from .parallelize import compile_blocks, full_tensor, gradient_sync, parallelize, place, reshard

__all__ = [
    "compile_blocks",
    "full_tensor",
    "gradient_sync",
    "open_writer",
    "parallelize",
    "place",
    "reshard",
]
