"""Checks of the doctor that need torch: GPUs, and a kernel compiled and run. `tilewright doctor` runs this file.

Prints JSON lines: {"begin": NAME} before each check, so that the parent can name a check that hangs, then its findings.
"""

import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..kernels.device import gpu_of
from ..kernels.dispatch import HAS_TRITON, interpreting, jit, tl
from ..kernels.inspect import inspect, kernel_case
from ..kernels.launch import launch, recording
from .doctor_checks import Finding, guarded, one_line, output

# The attention kernels need asynchronous copies and bfloat16.
LEAST_CAPABILITY = (8, 0)
# Target of the compilation on machines without a GPU.
ARCHITECTURE = "sm_90"


@jit
def _kernel(x_ptr, y_ptr, size, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + i, mask=i < size)
    tl.store(y_ptr + i, 2 * x + 1, mask=i < size)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    version = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if version:
        return version.splitlines()[0]
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module .*?(\d+\.[\d.]+)", file.read_text()) if file.exists() else None
    return found[1] if found else None


def _why_none() -> str:
    """Return why torch finds no GPU, and the remedy."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: if there is a GPU, install a CUDA build from https://pytorch.org"
        )
    driver = _driver()
    if driver is None:
        return "there is no NVIDIA driver: if there is a GPU, install the driver, or start the container with --gpus all"
    try:
        torch.cuda.init()
        why = "no reason given"
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split())[:200]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}: unset it to see all GPUs"
    return f"driver {driver}, torch for CUDA {torch.version.cuda}: {why}{hidden}"


def no_gpu() -> list[Finding]:
    """Report why torch finds no GPU."""
    return [Finding("warning", "gpu", f"torch.cuda finds no GPU, so the PyTorch references run: {_why_none()}")]


def gpu(index: int) -> list[Finding]:
    """Describe a GPU and check that it supports the kernels."""
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    text = f"cuda:{index}, {torch.cuda.get_device_name(device)}, driver {_driver() or 'unknown'}, CUDA {torch.version.cuda}, "
    text += f"capability {'.'.join(map(str, capability))}, {free / 1e9:,.1f} of {total / 1e9:,.1f} GB free, "
    text += "datasheet peak known" if gpu_of(device) else "datasheet peak unknown, so no MFU is shown"
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return [Finding("FAIL", "gpu", f"{text}: attention needs capability {least}: use --device cpu or another GPU")]
    return [Finding("ok", "gpu", text)]


def run_kernel(device: torch.device) -> list[Finding]:
    """Compile a kernel for this GPU, run it, and check its result."""
    start = time.perf_counter()
    x = torch.arange(1000, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    launch(_kernel, 8, x, y, len(x), block=128)
    # Compare on the CPU: a faulty GPU cannot be trusted to compare.
    is_right = torch.equal(y.cpu(), 2 * torch.arange(1000, dtype=torch.float32) + 1)
    if not is_right:
        text = f"a kernel ran on {device} and its result is wrong: check the GPU with `nvidia-smi -q -d ECC` and `dmesg`"
        return [Finding("FAIL", "kernel", text)]
    text = f"compiled and run on {device} in {time.perf_counter() - start:.1f} s, with the correct result"
    return [Finding("ok", "kernel", text)]


def compile_kernel() -> list[Finding]:
    """Compile the kernel for sm_90, without a GPU."""
    start = time.perf_counter()
    x = torch.empty(1000, device="meta")
    with recording((9, 0)) as recorded:
        launch(_kernel, 8, x, x, len(x), block=128)
    case = kernel_case(recorded[0], "doctor")
    try:
        report = inspect(case, ARCHITECTURE)
    except Exception as error:
        # A warning only: without a GPU the kernel is not needed.
        return [Finding("warning", "kernel", f"a kernel does not compile for {ARCHITECTURE}: {one_line(error)}")]
    seconds = time.perf_counter() - start
    text = f"compiled for {ARCHITECTURE} in {seconds:.1f} s ({report.registers} registers); not run, because there is no GPU"
    return [Finding("ok", "kernel", text)]


def no_kernel() -> list[Finding]:
    """Report why no kernel is compiled."""
    if interpreting():
        text = "TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it except for debugging"
    else:
        text = "Triton cannot be imported, so the slower PyTorch references run"
    return [Finding("warning", "kernel", text)]


def all_checks() -> list[tuple[str, Callable[[], list[Finding]]]]:
    """Return the checks for this machine, each with its name."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [("gpu", partial(gpu, index)) for index in range(num_gpus)]
    checks = checks or [("gpu", no_gpu)]
    if not HAS_TRITON or interpreting():
        return [*checks, ("kernel", no_kernel)]
    kernels = [("kernel", partial(run_kernel, torch.device("cuda", index))) for index in range(num_gpus)]
    return checks + (kernels or [("kernel", compile_kernel)])


def main() -> None:
    """Run the checks and print their findings."""
    print(json.dumps({"begin": "gpu"}), flush=True)
    for name, check in all_checks():
        print(json.dumps({"begin": name}), flush=True)
        for finding in guarded(name, check):
            print(json.dumps(vars(finding)), flush=True)


if __name__ == "__main__":
    main()
