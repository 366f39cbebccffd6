"""Limits of each kernel on Hopper, from a static analysis of its machine code: `tilewright bench inspect --model`.

Kernels with products of warp groups are modeled by their main loops (`loop_model`), memory-bound kernels by their bytes in
flight (`bandwidth_model`). No kernel runs and no GPU is needed. The two modules document their assumptions.
"""

import heapq
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from ..kernels.attention.choice import FORMS, use_attention_kernel
from ..kernels.attention.configurations import rows_at_once
from ..kernels.attention.hopper_backward import attention_backward_hopper
from ..kernels.inspect import KernelCase, Report, compile_case, kernel_case, launches, num_warps_of, report_on
from ..kernels.launch import Launch
from ..kernels.op import ALL, Op, Sizes
from .bandwidth_model import BANDWIDTH, bandwidth_of
from .jobs import Job, Row, Rows
from .loop_model import CLOCK, NUM_SMS, PEAK_TFLOPS, LoopReport, calibrated, simulate
from .op_peers import PEERS
from .peers import Unsupported
from .sass import Item, disassemble, loops, multiplies

ARCHITECTURE = "sm_90"
PREDICTED = "predicted"
BYTES_BESIDE_PRODUCTS = {"attention_backward_delta": 4, "attention_backward_dq": 6, "attention_backward_again": 4}
"""Bytes read and written per query and channel by the kernels before and after the fused backward kernel."""
PROGRAM_CYCLES = 3000
"""Assumed cycles of a program outside its loops: until the first tile arrives, and until the result is written. At 16,384
tokens and head dim 128, doubling them lowers a prediction by 2%."""


def form_of(case: KernelCase) -> str:
    """Return the kind of a kernel: `portable`, `gluon` or `fused`."""
    if case.kernel is attention_backward_hopper:
        return "fused"
    return "gluon" if case.kernel.is_gluon() else "portable"


def groups_of(case: KernelCase) -> int:
    """Return the number of groups of four warps per program that multiply."""
    return dict(case.constants)["GROUPS"] if case.kernel.is_gluon() else case.num_warps // 4


@dataclass(frozen=True)
class Analysis:
    """Compiled code of a kernel, and the model of its main loops."""

    report: Report
    items: list[Item]
    num_warps: int
    full: LoopReport | None
    """Loop over tiles without a mask; None for a kernel whose loops contain no products of warp groups."""
    masked: LoopReport | None


@cache
def analyse(case: KernelCase) -> Analysis:
    """Compile a kernel and model its main loops."""
    compiled = compile_case(case, ARCHITECTURE)
    items = disassemble(compiled.asm["cubin"])
    report = report_on(case, ARCHITECTURE, compiled)
    # Specialized warp groups all have the same loops; the loop with the mask is the longest.
    bodies = sorted((body for body in loops(items) if multiplies(body)), key=len)
    ends = (bodies[0], bodies[-1]) if bodies else ()
    full, masked = [simulate(body, groups_of(case), report.programs_per_sm) for body in ends] or (None, None)
    return Analysis(report, items, num_warps_of(compiled.asm["ptx"]), full, masked)


def _loop_rows(case: KernelCase, found: Analysis, full: LoopReport, masked: LoopReport) -> Rows:
    # All modeled attention calls are causal with equal lengths, so the head dim identifies them.
    head_dim = next(part for part in case.name.split() if re.fullmatch(r"K\d+", part))
    waits = max(full.waits, key=lambda reason: full.waits[reason])
    row = {"case": f"{case.kernel.__name__} {head_dim}", "variant": form_of(case)}
    yield row | {
        "table": "main loops",
        "programs": found.report.programs_per_sm,
        "cycles": full.cycles,
        "cycles_masked": masked.cycles,
        "share_of_peak": full.share,
        "executed_tflop_per_s": calibrated(full.share, form_of(case)),
        "busiest": full.limiter,
        "waits_for": waits,
        "wait_cycles": full.waits[waits],
    }
    pipes = {name: full.pipes[name] for name in ("mufu", "alu", "fma", "imad", "lsu")}
    yield row | {"table": "busy cycles of main loops", "tensor": full.tensor, **pipes, "issue": full.issue}


def model_rows(case: KernelCase, variant: str) -> Rows:
    """Yield the model's rows of a kernel."""
    found = analyse(case)
    if found.full is not None and found.masked is not None:
        yield from _loop_rows(case, found, found.full, found.masked)
        return
    bandwidth = bandwidth_of(found.items, found.num_warps, case.num_stages, found.report.programs_per_sm)
    if bandwidth is not None:
        yield {
            "case": case.name,
            "variant": variant,
            "table": "memory",
            "registers": found.report.registers,
            "occupancy": found.report.occupancy,
            "kib_in_flight": bandwidth.bytes_in_flight / 1024,
            "instructions_per_element": bandwidth.instructions_per_element,
            "mufu_per_element": bandwidth.mufu_per_element,
            **{f"share_of_{gpu}": bandwidth.share(gpu) for gpu in BANDWIDTH},
            **{f"limit_on_{gpu}": bandwidth.limiter(gpu) for gpu in BANDWIDTH},
        }


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record the launches of other libraries on `meta` tensors instead of launching them."""
    from triton.runtime.jit import JITFunction

    launched: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **constants: Any) -> None:
        launched.append(Launch(kernel, 0, args, constants))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(multi_processor_count=NUM_SMS)),
        # Code that reads values, such as the number of targets, only scales by them or checks them.
        mock.patch.object(torch.Tensor, "item", return_value=1),
        mock.patch.object(torch.Tensor, "__bool__", return_value=True),
        mock.patch.object(torch, "equal", return_value=True),
    ):
        yield launched


def peer_cases(op: Op, sizes: Sizes, peer: str) -> list[KernelCase]:
    """Return the kernels of a peer's call and its backward pass; raise `Unsupported` without one."""
    device = torch.device("meta")
    arguments = op.arguments(device, torch.bfloat16, **sizes)
    function = PEERS[op.name][peer](sizes, device)
    with recorded_launches() as launched:
        outputs = function(*arguments.positional)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None and y.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    label = op.label(dict(sizes))
    return [kernel_case(launch, f"{launch.kernel.__name__} {label}") for launch in launched]


def _op_rows(op: Op, sizes: Sizes) -> Rows:
    cases: dict[KernelCase, str] = {}
    for form in FORMS:
        with use_attention_kernel(form):
            cases |= dict.fromkeys(launches(op, {**sizes, "dtype": torch.bfloat16}, ARCHITECTURE), "tilewright")
    row: Row = {"case": op.label(dict(sizes)), "variant": "liger"}
    try:
        if "liger" in PEERS.get(op.name, {}):
            cases |= dict.fromkeys(peer_cases(op, sizes, "liger"), "liger")
    except Unsupported as reason:
        yield row | {"not_measured": str(reason)}
    except Exception as error:  # another version of a peer can fail, for example when it reads a tensor's values
        yield row | {"not_measured": f"{type(error).__name__}: {error}"[:200]}
    with ThreadPoolExecutor() as pool:
        for rows in pool.map(lambda item: list(model_rows(*item)), cases.items()):
            yield from rows


def causal_tiles(num_tokens: int, kept: int, looped: int, of_keys: bool) -> tuple[int, int, int]:
    """Return the numbers (programs, tiles without a mask, masked tiles) of one head under a causal mask.

    A program keeps `kept` queries and loops over keys, or keeps keys and loops over queries if `of_keys`.
    """
    full = masked = 0
    starts = range(0, num_tokens, kept)
    for start in starts:
        end = min(start + kept, num_tokens)
        # In loop order, unmasked tiles come before the first row's diagonal, or with `of_keys` after the last row's.
        before = (num_tokens - (-(-(end - 1) // looped) * looped)) // looped if of_keys else start // looped
        met = -(-num_tokens // looped) - start // looped if of_keys else -(-end // looped)
        full, masked = full + before, masked + met - before
    return len(starts), full, masked


def makespan(cycles: Iterable[float]) -> float:
    """Return when the last program ends, if programs of these lengths start in this order, one per multiprocessor."""
    free = [0.0] * NUM_SMS
    for each in cycles:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def block_counts(num_blocks: int, num_rows: int, rows_at_once: int) -> Iterator[int]:
    """Yield the number of query blocks that each program of the fused backward kernel adds to, in order of launch.

    This is the cost of a program. Programs of the last keys start first and are the shortest. If all programs are equally
    fast, waiting for a turn costs nothing: a program starts after the programs of later keys, which reach the same block
    sooner.
    """
    for first_row in range(0, num_rows, rows_at_once):
        for block in range(num_blocks):
            yield from [block + 1] * min(rows_at_once, num_rows - first_row)


def _shape(case: KernelCase) -> tuple[int, int, bool]:
    constants = dict(case.constants)
    if case.kernel.is_gluon():
        of_keys = "BLOCK_M" in constants
        return 64 * constants["GROUPS"], constants["BLOCK_M" if of_keys else "BLOCK_N"], of_keys
    kept, looped = constants["BLOCK_M"], constants["BLOCK_N"]
    return (looped, kept, True) if "backward_kv" in case.kernel.__name__ else (kept, looped, False)


def predicted_ms(case: KernelCase, sizes: Sizes) -> float:
    """Return the calibrated prediction of the time of a causal attention kernel."""
    found = analyse(case)
    num_rows, num_tokens, head_dim = sizes["batch"] * sizes["num_heads"], sizes["num_queries"], sizes["head_dim"]
    if found.full is None or found.masked is None:
        bandwidth = bandwidth_of(found.items, found.num_warps, case.num_stages, found.report.programs_per_sm)
        assert bandwidth is not None
        moved = BYTES_BESIDE_PRODUCTS[case.kernel.__name__] * num_rows * num_tokens * head_dim
        return moved / (bandwidth.share("H100") * BANDWIDTH["H100"]) * 1e3
    slower = found.full.share * PEAK_TFLOPS / calibrated(found.full.share, form_of(case))
    kept, looped, of_keys = _shape(case)
    if case.kernel is attention_backward_hopper:
        q = torch.empty(sizes["batch"], sizes["num_heads"], num_tokens, head_dim, dtype=torch.bfloat16, device="meta")
        block_cycles = kept // looped * found.full.cycles
        blocks = block_counts(-(-num_tokens // kept), num_rows, rows_at_once(q, 2, num_rows))
        return makespan(PROGRAM_CYCLES + n * block_cycles for n in blocks) * slower / CLOCK * 1e3
    programs, tiles, masked_tiles = causal_tiles(num_tokens, kept, looped, of_keys)
    # A report covers one iteration of all programs on a multiprocessor.
    per_sm = found.report.programs_per_sm
    cycles = (tiles * found.full.cycles + masked_tiles * found.masked.cycles + programs * PROGRAM_CYCLES) / per_sm
    return cycles * slower * num_rows / NUM_SMS / CLOCK * 1e3


def _predicted(sizes: Sizes) -> Rows:
    op = ALL["attention"]
    for form in FORMS:
        with use_attention_kernel(form):
            cases = list(launches(op, {**sizes, "dtype": torch.bfloat16}, ARCHITECTURE))
        if form == "fused" and all(case.kernel is not attention_backward_hopper for case in cases):
            continue
        times = {case.kernel.__name__: predicted_ms(case, sizes) for case in cases}
        costs = op.cost(2, **sizes)
        forward, *backward = times.values()
        parts = {
            "forward": (costs.forward, forward),
            "backward": (costs.backward, sum(backward)),
            "both": (costs.both, forward + sum(backward)),
        }
        for direction, (cost, ms) in parts.items():
            assert cost is not None
            name, rate = f"{op.label(dict(sizes))} {direction}", cost.flops / ms / 1e9
            yield {"case": name, "variant": form, "table": PREDICTED, "predicted_ms": ms, "predicted_tflop_per_s": rate}


def _causal_shapes() -> dict[int, Sizes]:
    causal = [s for s in ALL["attention"].shapes if s["num_queries"] == 16_384 and "window" not in s]
    return {head_dim: next(s for s in causal if s["head_dim"] == head_dim) for head_dim in (64, 128, 256)}


def modelled() -> Iterator[tuple[str, Op, Sizes]]:
    """Yield (name, op, sizes) so that every kernel is covered: each op's first shape, and shapes that launch other kernels.

    The latter are attention at each head dim, a decoding step, and 8-bit products with a scale per row.
    """
    attention, fp8 = ALL["attention"], ALL["fp8_linear"]
    for op in ALL.values():
        if op is not attention:
            yield op.name, op, op.shapes[0]
    for head_dim, sizes in _causal_shapes().items():
        yield f"attention K{head_dim}", attention, sizes
    yield "decoding", attention, next(s for s in attention.shapes if s["num_queries"] == 1)
    yield "fp8_linear by rows", fp8, next(s for s in fp8.shapes if s["rowwise"])


def model_jobs() -> Iterator[Job]:
    """Yield jobs for the model of all kernels, and for the predictions of causal attention."""
    for name, op, sizes in modelled():
        yield Job(f"model of {name}", partial(_op_rows, op, sizes))
    for head_dim, sizes in _causal_shapes().items():
        yield Job(f"prediction of attention K{head_dim}", partial(_predicted, sizes))
