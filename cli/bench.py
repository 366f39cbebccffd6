"""The bench: measured, tuned, reported, compared."""

import sys
from collections.abc import Sequence

from .options import parse


def bench(arguments: Sequence[str]) -> None:
    """Measure the kernels, the tokenizer and the training loop; see `tilewright bench --help`."""
    from ..bench import BenchConfig, run_bench

    run_bench(parse(BenchConfig, "bench", arguments, bench.__doc__))


def bench_tune(arguments: Sequence[str]) -> None:
    """Find the fastest launches of attention's kernels on this GPU, and ship them from then on."""
    from ..bench import TuneConfig, run_tune

    run_tune(parse(TuneConfig, "bench tune", arguments, bench_tune.__doc__))


def bench_report(arguments: Sequence[str]) -> None:
    """Write all results of the bench as a page of tables and pictures, and refresh the README's table."""
    from ..bench import ReportConfig, run_report

    run_report(parse(ReportConfig, "bench report", arguments, bench_report.__doc__))


def bench_compare(arguments: Sequence[str]) -> None:
    """Compare the times of two runs of the bench; the exit status is 1 where a case has become slower."""
    from ..bench import CompareConfig, run_compare

    if run_compare(parse(CompareConfig, "bench compare", arguments, bench_compare.__doc__)):
        sys.exit(1)
