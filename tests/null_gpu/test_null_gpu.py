"""The null GPU reports an error of each kind; each runs in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not os.environ.get("NULL_GPU"), reason="needs the null GPU, which `make test-null-gpu` sets up")


def run(name: str, num_gpus: int = 1) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).resolve().parents[1])
    variables = {**os.environ, "NULL_GPU": str(num_gpus), "PYTHONPATH": tests}
    command = [sys.executable, "-P", "-m", "null_gpu.mistakes", name]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("memory_of_the_host", "memory of the host"),
        ("freed_memory", "which is not allocated"),
        ("memory_of_another_device", "memory of device 1, and the stream is of device 0"),
        ("stream_of_another_device", "on a stream of device 1, current is 0"),
        ("synchronising_in_a_capture", "cudaDeviceSynchronize while a stream is captured"),
        ("stream_that_stays_in_a_capture", "before 1 streams that joined it have come back"),
        ("too_much_shared_memory", "300000 bytes of shared memory"),
    ],
)
def test_an_error_is_reported_and_raised(name, told):
    done = run(name, 2 if "another_device" in name else 1)
    faults = [line for line in done.stderr.splitlines() if line.startswith("[null GPU] fault: ")]
    assert faults, done.stderr
    assert told in faults[0]
    assert done.returncode == 1


def test_a_correct_program_reports_no_fault():
    done = run("no_mistake")
    assert done.returncode == 0, done.stderr
    assert "fault" not in done.stderr


def test_a_test_that_breaks_the_context_fails_alone():
    command = [sys.executable, "-m", "pytest", "-p", "null_gpu.plugin", "-p", "no:cacheprovider", "-m", "gpu", "-n", "1", "-q"]
    files = ["kernels/test_rope.py", "kernels/test_geglu.py", "-k", "test_autocast_keeps_dtypes or 1-dtype2-False-tanh"]
    variables = {**os.environ, "NULL_GPU": "1", "NULL_GPU_BREAKS_AT": "rope_forward"}
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([*command, *files], cwd=tests, env=variables, capture_output=True, text=True, timeout=240)
    assert "crashed while running 'tests/kernels/test_rope.py::test_autocast_keeps_dtypes'" in done.stdout, done.stdout
    assert "1 passed" in done.stdout
