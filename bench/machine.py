"""What a result was measured on, and the ceilings of that machine, measured in the same run."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..kernels.device import device_name
from .timing import time_variants


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions and the commit; None for what cannot be found out."""
    is_gpu = device.type == "cuda"
    query = ("nvidia-smi", f"--id={device.index or 0}", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "device": device_name(device) if is_gpu else _cpu_name(),
        "driver": _output(*query, "--query-gpu=driver_version") if is_gpu else None,
        "clocks": _output(*query, "--query-gpu=clocks.sm,clocks.mem,temperature.gpu") if is_gpu else None,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def copy_ceiling(device: torch.device) -> float:
    """Return the bandwidth of a device-to-device copy of 1 GiB, in bytes/s, reads and writes both counted."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    times = time_variants({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / (times.p50_ms * 1e-3)


def matmul_ceiling(device: torch.device, size: int = 8192) -> float:
    """Return the speed of a bfloat16 product of two random (size, size) matrices, in FLOP/s."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = time_variants({"matmul": lambda: a @ b}, device)["matmul"]
    return 2 * size**3 / (times.p50_ms * 1e-3)
