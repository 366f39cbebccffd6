"""Measures the toolkit against its accounting, against peers, and against the hardware it runs on."""

from .run import BenchConfig, run_bench

__all__ = ["BenchConfig", "run_bench"]
