"""Run the GPU-marked tests in several processes, smallest files first, and count their outcomes."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .jobs import Row, Rows, TimeOver

TESTS = Path(__file__).parent.parent / "tests"
# Most of a test is compilation on the CPU; each process holds about a gigabyte of GPU memory.
MOST_PROCESSES = 8
NAMED_FAILURES = 20
# Outcomes in pytest's words, and the names of their counts.
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped", "XFAIL": "xfailed"}
_WORDS = "|".join(OUTCOMES)
# The lines of one process, and of several: `a.py::test PASSED [ 1%]`, `[gw0] [  1%] PASSED a.py::test`.
_RESULT = re.compile(rf"^(?P<test>\S+\.py::.*?) (?P<word>{_WORDS})\b|^\[gw\d+\] .*?(?P<word2>{_WORDS}) (?P<test2>\S+\.py::.*)")
_STARTED = re.compile(r"^\S+\.py::")


def result_of(line: str) -> tuple[str, str] | None:
    """Return (test, outcome) of a line of `pytest -v`, or None for another line."""
    found = _RESULT.match(line)
    return found and (found["test"] or found["test2"], OUTCOMES[found["word"] or found["word2"]])


def is_shown(line: str) -> bool:
    """Return whether a line of `pytest -v` is more than the start or the success of a test."""
    found = result_of(line)
    return found[1] in ("failed", "errors") if found else not _STARTED.match(line)


def command(files: Sequence[Path]) -> list[str]:
    """Return the command that runs the GPU-marked tests of `files`, in several processes if pytest-xdist is installed."""
    options = ["-m", "gpu", "-v", "--tb", "short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
        # A process that a test hung or broke is replaced, so one bad kernel does not fail the tests after it.
        options += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "1000"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]


def run_gpu_tests(folder: Path | None = None) -> Rows:
    """Yield one row with the counts and the first failures; print failures with their tracebacks as pytest reports them."""
    folder, row = folder or TESTS, Row(case="GPU-marked tests")
    if not folder.is_dir():
        yield row | {"not_measured": "installed without tests"}
        return
    # A fault in a basic kernel shows in the small files.
    files = sorted(folder.rglob("test_*.py"), key=lambda path: path.stat().st_size)
    results: dict[str, str] = {}
    line, cut_off = "", None
    with subprocess.Popen(
        command(files), cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        process_group=0,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in map(str.rstrip, process.stdout):
                if found := result_of(line):
                    # A test whose process ends has two results; a failure counts.
                    test, outcome = found
                    results[test] = outcome if results.get(test) not in ("failed", "errors") else results[test]
                if is_shown(line):
                    print(line, flush=True)
            variant = "passed" if process.wait() == 0 else "FAILED"
        except BaseException as reason:
            # Kill the process group, with the compilers and other processes that tests start.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(reason, TimeOver):
                raise
            variant, cut_off = "cut off: no time left", reason
    counts = Counter(results.values())
    failures = [test for test, outcome in results.items() if outcome in ("failed", "errors")]
    if cut_off is not None:
        line = f"{counts['passed']} passed, {len(failures)} failed until then"
    yield row | {
        "variant": variant,
        **{name: counts[name] for name in OUTCOMES.values()},
        "failures": ", ".join(failures[:NAMED_FAILURES]) or None,
        "summary": line[:200],
    }
    if cut_off is not None:
        raise cut_off
