"""Sweeps: a run for each point of a grid of options, their results, and their curves."""

from .grid import SweepConfig, sweep
from .result import SweepPoint, SweepResult, sweep_table

__all__ = ["SweepConfig", "SweepPoint", "SweepResult", "sweep", "sweep_table"]
