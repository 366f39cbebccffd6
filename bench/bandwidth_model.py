"""A static model of memory-bound Hopper kernels: bytes in flight, and instructions per byte moved.

A multiprocessor reaches its bandwidth only if enough bytes are in flight (Little's law), and if issuing the instructions takes
no longer than moving the bytes. The model reads both from the part of the machine code that moves most bytes: a loop, or the
whole code if no loop moves any. It assumes that caches are cold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..datasheet import GPUS
from .loop_model import CLOCK, CYCLES, NUM_SMS
from .sass import NO_SCOREBOARD, Instruction, Item, loops

BANDWIDTH = {"H100": GPUS["NVIDIA H100 80GB HBM3"].bandwidth * 1e12, "H200": GPUS["NVIDIA H200"].bandwidth * 1e12}
# Bytes in flight per multiprocessor: its share of the bandwidth times the load latency of about 1.3 us, rounded.
BYTES_IN_FLIGHT = {"H100": 32 * 1024, "H200": 48 * 1024}
SUB_PARTITIONS = 4


@dataclass(frozen=True)
class BandwidthReport:
    """Work of a multiprocessor per byte that it moves."""

    bytes_in_flight: int
    """Bytes in flight per multiprocessor before its warps first wait for a load."""
    instructions_per_element: float
    """Instructions per lane for each two bytes read or written."""
    mufu_per_element: float
    busy: dict[str, float]
    """Cycles of a multiprocessor per byte, for the issue slot and each pipe."""

    def share(self, gpu: str) -> float:
        """Return the predicted share of a GPU's bandwidth."""
        memory = NUM_SMS * CLOCK / BANDWIDTH[gpu]
        return min(1.0, self.bytes_in_flight / BYTES_IN_FLIGHT[gpu], memory / max(self.busy.values()))

    def limiter(self, gpu: str) -> str:
        """Return the limit: memory, bytes in flight, the issue slot or a pipe."""
        slowest = max(self.busy, key=lambda name: self.busy[name])
        if self.share(gpu) == 1.0:
            return "memory"
        return "bytes in flight" if self.share(gpu) == self.bytes_in_flight / BYTES_IN_FLIGHT[gpu] else slowest


def first_batch(items: Sequence[Item]) -> int:
    """Return the most bytes that a thread has requested before it waits for one of them."""
    best, batch, boards = 0, 0, set()
    for x in items:
        if isinstance(x, str):
            continue
        if batch and any(x.wait >> board & 1 for board in boards):
            best, batch, boards = max(best, batch), 0, set()
        # Loads of single elements are indices and statistics.
        if x.base == "LDG" and x.bytes >= 4:
            batch += x.bytes
            if x.write < NO_SCOREBOARD - 1:
                boards.add(x.write)
    return max(best, batch)


def _moved(body: Sequence[Instruction]) -> int:
    return sum(x.bytes for x in body)


def bandwidth_of(items: Sequence[Item], num_warps: int, num_stages: int, programs: int) -> BandwidthReport | None:
    """Return the model of a kernel with `programs` programs per multiprocessor; None if it moves no bytes."""
    whole = [x for x in items if not isinstance(x, str) and x.base != "NOP"]
    body = max([*loops(list(items)), []], key=_moved)
    body = body if _moved(body) else whole
    moved = _moved(body)
    if moved == 0:
        return None
        # Asynchronous copies to shared memory run ahead by all stages but one.
    copied = sum(x.bytes for x in body if x.base == "LDGSTS") * max(num_stages - 1, 1)
    busy = {"issue": float(len(body))}
    for x in body:
        busy[x.pipe] = busy.get(x.pipe, 0.0) + CYCLES[x.pipe]
    elements = moved / 2
    return BandwidthReport(
        bytes_in_flight=max(first_batch(items), copied) * 32 * num_warps * programs,
        instructions_per_element=len(body) / elements,
        mufu_per_element=sum(x.pipe == "mufu" for x in body) / elements,
        busy={name: cycles / SUB_PARTITIONS / (32 * moved) for name, cycles in busy.items()},
    )
