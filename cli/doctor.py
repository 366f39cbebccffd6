"""The command `doctor`: checks the installation and prints what a bug report needs.

It imports the standard library only, so that it runs where packages are missing. Checks that need torch run in a subprocess,
because a call to a broken GPU may never return.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from .doctor_checks import Finding, caches, compiler, guarded, installed, packages, system, versions

GPU_CHECKS = (sys.executable, "-P", "-m", f"{__package__}.doctor_gpu")
# Exists if a driver is loaded, even if torch cannot be imported.
_DRIVER = Path("/dev/nvidiactl")


def _records(output: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON records in the output of the subprocess; skip output of libraries, and incomplete lines."""
    for line in output.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and ("begin" in record or record.keys() == {"status", "check", "text"}):
                yield record


@contextmanager
def _raising_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into exceptions, so that the subprocess ends with this process."""
    # Only the main thread can set handlers. Ignored signals, as under nohup, stay ignored; None is a handler set from C.
    is_main = threading.current_thread() is threading.main_thread()
    kept = (signal.SIG_IGN, None)
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(n) not in kept]

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_checks(command: Sequence[str], time_limit: float) -> list[Finding]:
    """Run checks in a subprocess; a crash, or a run longer than `time_limit` seconds, is a finding."""
    temporary = tempfile.TemporaryDirectory(prefix="tilewright-doctor-", ignore_cleanup_errors=True)
    with _raising_signals(), temporary as folder:
        # Files, not pipes: children of a killed process may keep a pipe open.
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        # An empty cache forces a compilation.
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        try:
            status = process.wait(time_limit)
        except BaseException as error:
            # Kill its children too, such as a compiler.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that hangs in the driver cannot be killed: leave it.
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        records = list(_records(stdout))
        last_line = stderr.read_text(errors="replace").strip().splitlines()[-1:]
    findings = [Finding(**record) for record in records if "begin" not in record]
    if status == 0:
        return findings
    begun = next((record["begin"] for record in reversed(records) if "begin" in record), "torch")
    if status is None:
        text = f"no answer in {time_limit:g} s: `nvidia-smi` and `dmesg` may show the cause; --time-limit raises the limit"
        return [*findings, Finding("FAIL", begun, text)]
    how = f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"ended with status {status}"
    return [*findings, Finding("FAIL", begun, f"its process {how}: {''.join(last_line)[:300] or 'no output on stderr'}")]


def gpu_checks(time_limit: float) -> list[Finding]:
    """Check the GPUs and compile a kernel, if torch is installed."""
    if installed("torch") is None:
        return [Finding("warning", "gpu", "not checked, and no kernel compiled: torch is missing")]
    if sys.stderr.isatty():
        print(f"tilewright: checking GPUs and compiling a kernel (at most {time_limit:g} s)", file=sys.stderr)
    return run_checks(GPU_CHECKS, time_limit)


def all_findings(time_limit: float) -> Iterator[Finding]:
    """Run the checks one after the other, quick ones first, and yield their findings."""
    for name, check in (("system", system), ("packages", packages), ("versions", versions)):
        yield from guarded(name, check)
    of_gpu = guarded("gpu", partial(gpu_checks, time_limit))
    yield from of_gpu
    # A GPU that fails its check is still a GPU.
    has_gpu = any(finding.check == "gpu" and finding.status != "warning" for finding in of_gpu) or _DRIVER.exists()
    yield from guarded("compiler", partial(compiler, has_gpu))
    yield from guarded("cache", partial(caches, has_gpu))


def doctor(arguments: Sequence[str]) -> None:
    """Check the installation: packages, GPUs, compiler, caches; exits with status 1 if a check fails."""
    parser = argparse.ArgumentParser(
        "tilewright doctor",
        description=doctor.__doc__,
        epilog="Prints one line per check, for a bug report: packages and their versions, GPUs, a kernel compiled and run, "
        "Triton's compiler, caches. A warning means that something is slower, untested or absent. Needs no packages itself.",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="limit for the checks of GPUs and the kernel (default: 120)",
    )
    time_limit = parser.parse_args(arguments).time_limit
    if not 0 < time_limit < 1e6:
        raise UserError(f"time_limit is {time_limit:g}: expected seconds above 0 and below 1e6")
    statuses = []
    for finding in all_findings(time_limit):
        statuses.append(finding.status)
        print(f"{finding.status:7}  {finding.check:8}  {finding.text}", flush=True)
    print(f"{statuses.count('FAIL')} FAIL, {statuses.count('warning')} warning, {statuses.count('ok')} ok")
    if "FAIL" in statuses:
        sys.exit(1)
