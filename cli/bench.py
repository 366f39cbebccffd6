"""The commands `bench`, `bench tune`, `bench report` and `bench compare`."""

import difflib
import sys
from collections.abc import Sequence

from ..errors import UserError
from .options import parse


def bench(arguments: Sequence[str]) -> None:
    """Benchmark the kernels, the tokenizer and the training loop."""
    from typing import get_args

    from ..bench.options import BenchConfig, StageName

    stages = get_args(StageName)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in stages:
        known = [*stages, "tune", "report", "compare"]
        near = difflib.get_close_matches(arguments[0], known, n=1)
        remedy = f"try `tilewright bench {near[0]}`" if near else f"choose one of {', '.join(known)}"
        raise UserError(f"bench {arguments[0]!r} is unknown: {remedy}")
    config = parse(BenchConfig, "bench", arguments, bench.__doc__)
    from ..bench import run_bench

    run_bench(config)


def bench_tune(arguments: Sequence[str]) -> None:
    """Find the fastest launch configurations of the attention kernels on this GPU, and store them as the new defaults."""
    from ..bench import TuneConfig

    config = parse(TuneConfig, "bench tune", arguments, bench_tune.__doc__)
    from ..bench import run_tune

    run_tune(config)


def bench_report(arguments: Sequence[str]) -> None:
    """Write a page of tables and plots from all benchmark results, and update the README's table."""
    from ..bench import ReportConfig

    config = parse(ReportConfig, "bench report", arguments, bench_report.__doc__)
    from ..bench import run_report

    run_report(config)


def bench_compare(arguments: Sequence[str]) -> None:
    """Compare the times of two benchmark runs; exits with status 1 if a case is slower."""
    from ..bench import CompareConfig

    config = parse(CompareConfig, "bench compare", arguments, bench_compare.__doc__)
    from ..bench import run_compare

    if run_compare(config):
        sys.exit(1)
