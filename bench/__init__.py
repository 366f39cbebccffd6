"""Measures the toolkit against its accounting, against peers, and against the hardware it runs on."""

from .run import BenchConfig, run_bench, run_tune
from .tune import TuneConfig

__all__ = ["BenchConfig", "TuneConfig", "run_bench", "run_tune"]
