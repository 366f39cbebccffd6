"""Measures the toolkit against its accounting, against peers, and against the hardware it runs on."""

from .compare import CompareConfig, run_compare
from .report import ReportConfig, run_report
from .run import BenchConfig, run_bench, run_tune
from .tune import TuneConfig

__all__ = [
    "BenchConfig",
    "CompareConfig",
    "ReportConfig",
    "TuneConfig",
    "run_bench",
    "run_compare",
    "run_report",
    "run_tune",
]
