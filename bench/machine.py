"""Describe the measured machine: versions, clocks, throttling, other processes. Changes no setting."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..kernels.device import device_name

# Rows of the matrices that load the GPU while its clocks are read.
LOAD = 4096
# nvidia-smi's field for each value.
_STATE = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "used_mib": "memory.used",
    "total_mib": "memory.total",
}
# NVML's bits for lowered clocks (nvml.h, nvmlClocksEventReasons), without idling and display settings, which do not throttle.
_REASONS = {
    0x2: "application clocks set",
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def _output(*command: str) -> str | None:
    try:
        # A failing driver may never answer.
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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


def _query(device: torch.device, *fields: str) -> list[str | None] | None:
    # Select the GPU by UUID: nvidia-smi numbers all GPUs, torch only the visible ones.
    uuid = torch.cuda.get_device_properties(device).uuid
    text = _output("nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader,nounits", f"--query-gpu={','.join(fields)}")
    found = parse_fields(text) if text else []
    return found if len(found) == len(fields) else None


def parse_fields(line: str) -> list[str | None]:
    """Return the fields of a line from nvidia-smi; None for a value that the GPU does not report."""
    fields = (field.strip() for field in line.splitlines()[0].split(","))
    # Brackets enclose a reason: [N/A], [Not Supported], [Unknown Error], [Insufficient Permissions], ...
    return [None if field.startswith("[") or field == "N/A" else field for field in fields]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def parse_reasons(mask: str | None) -> str | None:
    """Return the reasons for low clocks from NVML's bits, such as `0x0000000000000004`; "none", or None if unknown."""
    try:
        bits = int(mask or "", 16)
    except ValueError:
        return None
    return ", ".join(name for bit, name in _REASONS.items() if bits & bit) or "none"


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Return clocks, temperature, power, memory and the reasons for low clocks; {} if nvidia-smi does not answer."""
    values = _query(device, *_STATE.values())
    if values is None:
        return {}
    state: dict[str, Any] = dict(zip(_STATE, values, strict=True))
    numbers = {name: _number(value) for name, value in state.items() if name != "driver"}
    # The second name is that before driver 535.
    reasons = _query(device, "clocks_event_reasons.active") or _query(device, "clocks_throttle_reasons.active")
    return {"driver": state["driver"], **numbers, "throttled_by": parse_reasons(reasons[0] if reasons else None)}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions and the commit; None for unknown values.

    `cpu_load` is the mean number of running or waiting processes over the last minute.
    """
    is_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "device": device_name(device) if is_gpu else _cpu_name(),
        "driver": gpu_state(device).get("driver") if is_gpu else None,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def other_processes(text: str, own: int) -> list[tuple[str, str]]:
    """Return (name, memory) of the processes in nvidia-smi's list `pid, name, memory`, except the process `own`."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines() if line.strip()]
    return [(row[1], row[2]) for row in rows if len(row) == 3 and row[0] != str(own)]


@contextmanager
def _under_load(device: torch.device) -> Iterator[None]:
    """Multiply matrices on the GPU inside the block: an idle GPU lowers its clocks and never throttles."""
    stop, busy = threading.Event(), threading.Event()

    def work() -> None:
        # If this fails for lack of memory, the block reads the state at idle.
        with suppress(Exception):
            a = torch.randn(LOAD, LOAD, dtype=torch.bfloat16, device=device)
            product = torch.empty_like(a)
            while not stop.is_set():
                for _ in range(50):
                    torch.mm(a, a, out=product)
                torch.cuda.synchronize(device)
                busy.set()
        busy.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    busy.wait(10)
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def state_row(device: torch.device, when: str, slowdowns: Sequence[str] = ("slowdown", "brake")) -> dict[str, Any]:
    """Return a GPU's state under load as a row, marked if heat or a power brake throttles it and distorts times."""
    with _under_load(device):
        state = gpu_state(device)
    row = {"case": f"GPU {when}", **{name: value for name, value in state.items() if name != "driver"}}
    if not state:
        return row | {"not_measured": "nvidia-smi does not answer"}
    reason = state["throttled_by"] or ""
    return row | ({"suspicious": f"throttled: {reason}"} if any(word in reason for word in slowdowns) else {})


def machine_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the GPU's state, and every other process that computes on it.

    In a container the driver can report this process under another ID, as another process.
    """
    yield state_row(device, "before")
    uuid = torch.cuda.get_device_properties(device).uuid
    query = "--query-compute-apps=pid,process_name,used_memory"
    text = _output("nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader", query)
    for name, memory in other_processes(text or "", os.getpid()):
        yield {"case": "another process", "variant": name, "memory": memory, "suspicious": "shares the GPU"}
