"""What a bug report needs, and what says why Tilewright does not run here.

It imports nothing but Python's own: not tyro, as it is to run where packages are missing, and not torch, which it leaves to
a process of its own, as a GPU in trouble may never answer.
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
# There where a driver is loaded, whether or not torch can be imported.
_DRIVER = Path("/dev/nvidiactl")


def _records(said: Path) -> Iterator[dict[str, Any]]:
    """Yield what the process said, but for what libraries print meanwhile and for a line that was cut off."""
    for line in said.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and ("begin" in record or record.keys() == {"status", "check", "text"}):
                yield record


@contextmanager
def _raising_signals() -> Iterator[None]:
    """Have signals that would end this process raise, so that what it has started ends too."""
    # Python sets handlers in its main thread only. What is ignored, as by nohup, stays so; None is a handler set from C.
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
    """Make the checks of another process; one that dies or takes longer than `time_limit` seconds is a finding, too."""
    temporary = tempfile.TemporaryDirectory(prefix="tilewright-doctor-", ignore_cleanup_errors=True)
    with _raising_signals(), temporary as folder:
        # Files, not pipes: what a killed process has started may hold a pipe open.
        said, complaints = Path(folder, "said"), Path(folder, "complaints")
        # A cache that is empty, so that the compiler has to work.
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        with said.open("wb") as out, complaints.open("wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
        try:
            status = process.wait(time_limit)
        except BaseException as error:
            # With all that it has started, such as a compiler.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that hangs in the driver cannot even be killed: it is left behind.
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        records = list(_records(said))
        last_words = complaints.read_text(errors="replace").strip().splitlines()[-1:]
    findings = [Finding(**record) for record in records if "begin" not in record]
    if status == 0:
        return findings
    begun = next((record["begin"] for record in reversed(records) if "begin" in record), "torch")
    if status is None:
        text = f"no answer in {time_limit:g} s: `nvidia-smi` and `dmesg` may tell what hangs, or allow more by --time-limit"
        return [*findings, Finding("FAIL", begun, text)]
    how = f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"ended with status {status}"
    return [*findings, Finding("FAIL", begun, f"its process {how}: {''.join(last_words)[:300] or 'it said nothing'}")]


def gpu_checks(time_limit: float) -> list[Finding]:
    """Look at the GPUs and compile a kernel, where torch is there to do so."""
    if installed("torch") is None:
        return [Finding("warning", "gpu", "not looked at, nor a kernel compiled: torch is missing")]
    if sys.stderr.isatty():
        print(f"tilewright: looking at GPUs and compiling a kernel (at most {time_limit:g} s)", file=sys.stderr)
    return run_checks(GPU_CHECKS, time_limit)


def all_findings(time_limit: float) -> Iterator[Finding]:
    """Make one check after the other, the quick ones first, and yield what they find."""
    for name, check in (("system", system), ("packages", packages), ("versions", versions)):
        yield from guarded(name, check)
    of_gpu = guarded("gpu", partial(gpu_checks, time_limit))
    yield from of_gpu
    # One that fails is one, too.
    has_gpu = any(finding.check == "gpu" and finding.status != "warning" for finding in of_gpu) or _DRIVER.exists()
    yield from guarded("compiler", partial(compiler, has_gpu))
    yield from guarded("cache", partial(caches, has_gpu))


def doctor(arguments: Sequence[str]) -> None:
    """Say what is here and what keeps Tilewright from running; the exit status is 1 where something does."""
    parser = argparse.ArgumentParser(
        "tilewright doctor",
        description=doctor.__doc__,
        epilog="It prints a line a check, for a bug report: packages and their versions, GPUs, a kernel compiled and run, "
        "Triton's compiler, caches. A warning is no failure: something is slower, untested, or not there. It runs where "
        "packages are missing, too.",
    )
    parser.add_argument(
        "--time-limit", type=float, default=120.0, metavar="SECONDS", help="for GPUs and the kernel (default: 120)"
    )
    time_limit = parser.parse_args(arguments).time_limit
    if not 0 < time_limit < 1e6:
        raise UserError(f"time_limit is {time_limit:g}: it must be above 0 and below 1e6 seconds")
    statuses = []
    for finding in all_findings(time_limit):
        statuses.append(finding.status)
        print(f"{finding.status:7}  {finding.check:8}  {finding.text}", flush=True)
    print(f"{statuses.count('FAIL')} FAIL, {statuses.count('warning')} warning, {statuses.count('ok')} ok")
    if "FAIL" in statuses:
        sys.exit(1)
