"""A static model of a kernel that moves memory on Hopper: bytes in flight, and instructions for what it moves.

A multiprocessor reaches the bandwidth only with enough bytes under way (Little's law), and only if it does not issue
instructions for longer than its share of the memory takes to move them. Both are read from the piece of machine code that
moves most: the loop with most bytes, or where none moves any, the code as a whole. It assumes that caches hold nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.datasheet import GPUS
from .loop_model import CLOCK, CYCLES, NUM_SMS
from .sass import NO_SCOREBOARD, Instruction, Item, loops

BANDWIDTH = {"H100": GPUS["NVIDIA H100 80GB HBM3"].bandwidth * 1e12, "H200": GPUS["NVIDIA H200"].bandwidth * 1e12}
# That a multiprocessor needs: its share of the bandwidth for the 1.3 us or so until a load has arrived, rounded.
BYTES_IN_FLIGHT = {"H100": 32 * 1024, "H200": 48 * 1024}
SUB_PARTITIONS = 4


@dataclass(frozen=True)
class BandwidthReport:
    """What a multiprocessor does for the bytes that it moves."""

    bytes_in_flight: int
    """Of a multiprocessor, before its warps first wait for what they load."""
    instructions_per_element: float
    """Of a lane, for each two bytes that are read or written."""
    mufu_per_element: float
    busy: dict[str, float]
    """Cycles of a multiprocessor for each byte, by what is busy: issue, or a pipe."""

    def share(self, gpu: str) -> float:
        """Return which share of a GPU's bandwidth the model gives the kernel."""
        memory = NUM_SMS * CLOCK / BANDWIDTH[gpu]
        return min(1.0, self.bytes_in_flight / BYTES_IN_FLIGHT[gpu], memory / max(self.busy.values()))

    def limiter(self, gpu: str) -> str:
        """Return what limits it: memory, the bytes in flight, or what is busy for longer than memory."""
        slowest = max(self.busy, key=lambda name: self.busy[name])
        if self.share(gpu) == 1.0:
            return "memory"
        return "bytes in flight" if self.share(gpu) == self.bytes_in_flight / BYTES_IN_FLIGHT[gpu] else slowest


def first_batch(items: Sequence[Item]) -> int:
    """Return how many bytes a thread has asked for when it first waits for one of them: the most over straight pieces."""
    best, batch, boards = 0, 0, set()
    for x in items:
        if isinstance(x, str):
            continue
        if batch and any(x.wait >> board & 1 for board in boards):
            best, batch, boards = max(best, batch), 0, set()
        # Single elements are indices and statistics.
        if x.base == "LDG" and x.bytes >= 4:
            batch += x.bytes
            if x.write < NO_SCOREBOARD - 1:
                boards.add(x.write)
    return max(best, batch)


def _moved(body: Sequence[Instruction]) -> int:
    return sum(x.bytes for x in body)


def bandwidth_of(items: Sequence[Item], num_warps: int, num_stages: int, programs: int) -> BandwidthReport | None:
    """Return the model of a kernel of which `programs` programs share a multiprocessor; None where it moves nothing."""
    whole = [x for x in items if not isinstance(x, str) and x.base != "NOP"]
    body = max([*loops(list(items)), []], key=_moved)
    body = body if _moved(body) else whole
    moved = _moved(body)
    if moved == 0:
        return None
    # What is copied to shared memory without passing through registers runs ahead by all stages but one.
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
