"""Options of a sweep. This module imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SweepConfig:
    """The grid of a sweep."""

    grid: tuple[str, ...]
    """Options and their values, such as optimizer.lr=1e-4,3e-4 seed=0,1. optimizer.final_lr scales with optimizer.lr."""
