"""The trace of the calls to the null GPU, and counts of its events."""

import ctypes
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def trace_to(path: Path | None) -> None:
    """Write the events of this process's null GPU to `path`; None stops the trace. Import torch first."""
    ctypes.CDLL("libcuda.so.1").null_gpu_trace(None if path is None else str(path).encode())


def events(path: Path) -> list[tuple[str, ...]]:
    """Return the events of a trace, each as a tuple of its kind and its details; empty without a trace file."""
    if not path.exists():
        return []
    return [tuple(line.split("\t")) for line in path.read_text(errors="replace").splitlines() if line]


def _names(event: tuple[str, ...]) -> Iterable[tuple[str, int]]:
    """Yield (name, increment) for each count that an event contributes to."""
    kind, *rest = event
    if kind == "launch":
        # The stream of a library call is unknown.
        stream, device = rest[-2:]
        yield "launches", 1
        yield f"launches: {stream}", 1
        if device != "0":
            yield "launches: another device", 1
    elif kind == "graph":
        yield "graphs", 1
        yield "nodes of graphs", int(rest[0].split()[0])
    elif kind == "synchronise":
        yield "synchronisations", 1
        yield rest[0], 1
    elif kind == "copy":
        yield f"copies: {rest[0]}, {rest[-1]}", 1
        if rest[-1] != "async":
            yield "synchronisations", 1
    elif kind == "fill":
        yield "fills", 1
    elif kind == "allocate":
        yield "allocations", 1
    elif kind == "module":
        yield "modules", 1
    elif kind == "fault":
        yield "faults", 1


def count(of: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """Return the number of events of each kind. "synchronisations" counts all events at which the host waits.

    These include copies from or to pageable host memory.
    """
    counts: Counter[str] = Counter()
    for event in of:
        for name, number in _names(event):
            counts[name] += number
    return dict(sorted(counts.items()))
