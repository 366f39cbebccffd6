"""A static model of a Hopper kernel's main loop: instruction issue on one sub-partition of a multiprocessor.

The four sub-partitions of a multiprocessor are alike, and each runs one warp of every group of four, so the model simulates
one. It issues one instruction per cycle from the ready warps, following the control bits that the assembler set: stalls,
scoreboards, barriers, waits for products. Each instruction occupies its pipe; products occupy the tensor core, in order.

Assumptions: TMA and cp.async loads arrive in time; caches, power and clocks are no limit; only the loop's own branch is taken.
The model overestimates how well programs that share a multiprocessor overlap, so a share above 65% of the peak is an upper
bound if it depends on that overlap. `CALIBRATION` compares its shares with measurements.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..datasheet import GPUS
from .sass import NO_SCOREBOARD, Instruction

# Cycles that a warp's instruction occupies its pipe of a sub-partition: CUDA C++ Programming Guide, table "Throughput of Native
# Arithmetic Instructions", compute capability 9.0: 32 lanes over the lanes per cycle of a quarter of a multiprocessor.
CYCLES = {"fma": 1, "imad": 2, "alu": 2, "mufu": 8, "lsu": 4, "uniform": 2, "control": 1}
# Cycles until a result is available: Luo et al. 2024, arXiv:2402.13499, rounded.
LATENCY = {"fma": 6, "imad": 6, "alu": 6, "mufu": 22, "lsu": 28, "uniform": 12, "control": 20}
BARRIER_LATENCY = 24
TENSOR_LATENCY = 32
"""Cycles from the end of a product until a waiting warp continues."""
MUFU_QUEUE = 4
# H100 SXM and H200 (NVIDIA, H100 whitepaper).
NUM_SMS = 132
CLOCK = 1.83e9
"""Hz"""
PEAK_TFLOPS = GPUS["NVIDIA H100 80GB HBM3"].bf16
MULTIPLY_ADDS = 2048
"""Multiply-adds per cycle of a multiprocessor's tensor cores in half precision: PEAK_TFLOPS over all at this clock."""
SHARED_BYTES = 128
"""Bytes per cycle from a multiprocessor's shared memory."""
CALIBRATION = {"portable": 0.81, "gluon": 0.66, "fused": 0.57}
"""Measured over modeled speed. Each comes from one public figure for an H100 at head dim 128 and 16,384 tokens, without a mask:

- portable: Triton's tutorial reaches 487 TFLOP/s; the model gives our portable forward pass 600.
- gluon: FlashAttention-3 reaches 648; the model gives our Gluon forward pass the peak, 989.
- fused: FlashAttention-3's backward pass reaches 561; the model gives our fused backward pass the peak.

The factor includes power, clocks and every other unmodeled cost, such as the additions to dQ in the last case. The model
therefore cannot rank kernels whose predictions differ by less than about 15%."""
MOST_TFLOPS = PEAK_TFLOPS * CALIBRATION["gluon"]
"""Upper bound on predictions, by choice: FlashAttention-3's best case is 740 (arXiv:2407.08608)."""
SKEW = 500
"""Cycles between the starts of independent groups of warps. A loop with fewer instructions uses their count instead, because
all groups must be in the loop at once."""


@dataclass
class _Warp:
    program: int
    ready: float
    at: int = 0
    iteration: int = 0
    boards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    groups: list[float] = field(default_factory=list)
    """End of each group of products in flight."""
    at_barrier: bool = False
    ends: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class LoopReport:
    """Cycles for one iteration of every program on a multiprocessor."""

    cycles: float
    tensor: float
    """Cycles in which the tensor cores multiply or wait for operands."""
    products: float
    """Cycles of the products at the tensor cores' peak."""
    pipes: dict[str, float]
    """Cycles in which each pipe is busy."""
    issue: float
    """Cycles in which an instruction is issued."""
    waits: dict[str, float]
    """Mean cycles for which a warp could not issue, by reason."""

    @property
    def share(self) -> float:
        """Share of the tensor cores' peak."""
        return self.products / self.cycles

    @property
    def limiter(self) -> str:
        """The resource that is busy longest."""
        busy = {"tensor": self.tensor, **self.pipes, "issue": self.issue}
        return max(busy, key=lambda name: busy[name])


def calibrated(share: float, form: str) -> float:
    """Return the TFLOP/s expected on a GPU for a kernel of `form` with a modeled share of the peak."""
    return min(share * PEAK_TFLOPS * CALIBRATION[form], MOST_TFLOPS)


def peak_cycles(x: Instruction) -> float:
    """Return the cycles of a product at the tensor cores' peak."""
    return 64 * x.columns * 16 / MULTIPLY_ADDS


def tensor_cycles(x: Instruction) -> float:
    """Return the cycles for which a product occupies the tensor cores: multiplying, or waiting for shared memory."""
    return max(peak_cycles(x), x.from_shared * 16 * 2 / SHARED_BYTES)


class _Model:
    """State of a sub-partition."""

    def __init__(self, body: Sequence[Instruction], groups: int, programs: int, iterations: int) -> None:
        self.body, self.iterations = body, iterations
        # Groups of one program start together if a barrier synchronizes all its warps.
        tied = any(x.barrier_threads == 0 for x in body)
        skew = min(SKEW, len(body))
        self.warps = [_Warp(p, (p if tied else p * groups + g) * skew) for p in range(programs) for g in range(groups)]
        self.free = dict.fromkeys(CYCLES, 0.0)
        self.busy = dict.fromkeys(CYCLES, 0.0)
        self.queue: list[float] = []
        self.tensor_free = self.tensor_busy = 0.0
        self.issued = 0
        self.waits: defaultdict[str, float] = defaultdict(float)

    def next_time(self, w: _Warp) -> tuple[float, str]:
        """Return when a warp can issue its next instruction, and the reason for the wait."""
        x = self.body[w.at]
        times = [(w.ready, "the instruction before")]
        for b in range(6):
            if x.wait >> b & 1 and w.boards[b]:
                times.append((max(w.boards[b]), "results"))
        allowed = x.outstanding
        if allowed is not None:
            if len(w.groups) > allowed:
                times.append((w.groups[len(w.groups) - allowed - 1] + TENSOR_LATENCY, "products"))
        elif x.pipe == "mufu" and len(self.queue) >= MUFU_QUEUE:
            times.append((min(self.queue), "mufu"))
        elif x.pipe != "mufu" and not x.columns:
            times.append((self.free[x.pipe], x.pipe))
        return max(times)

    def issue(self, w: _Warp, now: float) -> None:
        """Issue a warp's next instruction."""
        x = self.body[w.at]
        self.issued += 1
        done = now + LATENCY[x.pipe]
        if x.columns:
            done = self.tensor_free = max(now, self.tensor_free) + tensor_cycles(x)
            self.tensor_busy += tensor_cycles(x)
            if x.ends_group:
                w.groups.append(done)
        elif x.pipe == "mufu":
            self.free["mufu"] = max(now, self.free["mufu"]) + CYCLES["mufu"]
            self.busy["mufu"] += CYCLES["mufu"]
            self.queue.append(self.free["mufu"])
            done = self.free["mufu"] + LATENCY["mufu"] - CYCLES["mufu"]
        else:
            self.free[x.pipe] = max(now, self.free[x.pipe]) + CYCLES[x.pipe]
            self.busy[x.pipe] += CYCLES[x.pipe]
        for board in (x.write, x.read):
            if board < NO_SCOREBOARD - 1:
                w.boards[board] = [end for end in w.boards[board] if end > now] + [done]
        w.ready = now + max(x.stall, 1)
        if x.outstanding is not None:
            w.groups = w.groups[len(w.groups) - x.outstanding :] if x.outstanding else []
        if x.barrier_threads == 0:
            self.meet(w, now)
        w.at += 1
        if w.at == len(self.body):
            w.at, w.iteration = 0, w.iteration + 1
            w.ends.append(now)

    def meet(self, w: _Warp, now: float) -> None:
        """Hold a warp at a barrier until all warps of its program arrive; the model has one of each four warps."""
        w.at_barrier = True
        peers = [v for v in self.warps if v.program == w.program]
        if all(v.at_barrier or v.iteration >= self.iterations for v in peers):
            for v in peers:
                if v.at_barrier:
                    self.waits["barrier"] += max(0.0, now - v.ready)
                v.at_barrier = False
                v.ready = max(v.ready, now + BARRIER_LATENCY)

    def run(self) -> None:
        """Issue all iterations of all warps, round-robin among the ready warps."""
        now, last = 0.0, 0
        while any(w.iteration < self.iterations for w in self.warps):
            self.queue = [t for t in self.queue if t > now]
            wake = float("inf")
            for step in range(1, len(self.warps) + 1):
                i = (last + step) % len(self.warps)
                w = self.warps[i]
                if w.iteration >= self.iterations or w.at_barrier:
                    continue
                time, reason = self.next_time(w)
                if time <= now:
                    self.waits[reason] += max(0.0, time - w.ready)
                    self.issue(w, now)
                    last = i
                    break
                wake = min(wake, time)
            else:
                now = max(now, float(-(-wake // 1)) - 1)
            now += 1


def simulate(body: Sequence[Instruction], groups: int, programs: int, iterations: int = 8) -> LoopReport:
    """Return the cost of a loop with `programs` programs of `groups` groups of four warps on a multiprocessor."""
    model = _Model(body, groups, programs, iterations)
    model.run()
    warps = model.warps
    # Steady state: skip the first two iterations and the last, in which other warps may have finished.
    first, final = (sum(w.ends[i] for w in warps) / len(warps) for i in (1, -2))
    per_iteration = 1 / iterations
    return LoopReport(
        cycles=(final - first) / (iterations - 3),
        tensor=model.tensor_busy * per_iteration,
        products=sum(map(peak_cycles, body)) * len(warps),
        pipes={pipe: busy * per_iteration for pipe, busy in model.busy.items()},
        issue=model.issued * per_iteration,
        waits={reason: cycles * per_iteration / len(warps) for reason, cycles in model.waits.items()},
    )
