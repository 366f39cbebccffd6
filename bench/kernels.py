"""Times of the kernel library's ops, as shares of the roofline from the ceilings of the same run."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.inspect import ARCHITECTURES, KernelCase, compile_case, distinct_cases
from ..kernels.op import Arguments, Cost
from .ceilings import Ceilings
from .check import Checker, WrongError, check, copies
from .jobs import Job, Row, Rows
from .memory import peak_on_gpu
from .ops import Case, Variant, cases
from .peers import OWN, Unsupported
from .timing import time_variants

# No kernel launch takes a CPU this long.
LONG_MS = 10.0
# A call that takes this long at the ceiling is steady, and needs fewer repetitions.
LONG_SECONDS = 2e-2


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # The gradient of a loss is 1: some peers skip the scaling in this case.
    return tuple(torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs)


class _Calls:
    """The calls to time for one variant."""

    def __init__(self, variant: Variant, positional: tuple[Any, ...]) -> None:
        self.variant, self.args = variant, copies(positional)
        self.wanted = [x for x in self.args if isinstance(x, Tensor) and x.requires_grad]

    def forward(self) -> Callable[[], object]:
        detached = copies(self.args, backward=False)
        return lambda: self.variant(*detached)

    def backward(self) -> Callable[[], object]:
        outputs = _tensors(self.variant(*self.args))
        gradients = _gradients(outputs)
        return lambda: torch.autograd.grad(outputs, self.wanted, gradients, retain_graph=True)

    def both(self) -> Callable[[], object]:
        gradients = _gradients(_tensors(self.variant(*self.args)))
        return lambda: torch.autograd.grad(_tensors(self.variant(*self.args)), self.wanted, gradients)


def _enqueue_ms(call: Callable[[], object]) -> float:
    """Return the time in which the CPU enqueues a call; a faster GPU waits for the CPU."""
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return sorted(samples)[2]


@dataclass
class _Progress:
    """State of a case's variants."""

    ready: dict[str, Variant] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    """Seconds to compile, check and call a variant once."""
    notes: dict[str, str | None] = field(default_factory=dict)


def prepare(
    variant: Variant, direction: str, positional: tuple[Any, ...], expected: Mapping[str, Checker] | None
) -> tuple[Callable[[], object], str | None]:
    """Return the call to time for one variant, after one trial call, and a note on its results and gradients.

    Raises `WrongError` for wrong results. Without `expected` the results are not checked.
    """
    note = check(variant, positional, expected, backward=direction != "forward") if expected is not None else None
    call = getattr(_Calls(variant, positional), direction)()
    call()
    return call, note


def _calls(
    case: Case, direction: str, arguments: Arguments, expected: Mapping[str, Checker], progress: _Progress, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return the call of each variant; a variant that fails or is wrong goes into `failed` with its reason."""
    calls = {}
    for name, make in case.forms(arguments.options, device).items():
        if name in progress.failed or not case.is_timed(name, direction):
            continue
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if name not in progress.ready:
                    progress.ready[name] = make()
                # The backward direction has already checked the same results.
                known = direction == "both" and name in progress.ready_s
                calls[name], note = prepare(progress.ready[name], direction, arguments.positional, None if known else expected)
                progress.notes[name] = progress.notes[name] if known else note
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                progress.ready_s[name] = time.perf_counter() - start
            except Unsupported as reason:
                progress.failed[name] = str(reason)
            except WrongError as error:
                progress.failed[name] = f"wrong: {error}"
            except Exception as error:  # a peer's failure, or a lack of memory, does not end the bench
                # SDPA warns about unsupported inputs of a backend before it fails.
                reasons = [f"{type(error).__name__}: {error}", *(str(warning.message) for warning in caught)]
                progress.failed[name] = "; ".join(reason.split(" (Triggered")[0] for reason in reasons)[:300]
    return calls


def timed_rows(
    case: str,
    calls: Mapping[str, Callable[[], object]],
    cost: Cost,
    device: torch.device,
    ceilings: Ceilings,
    rounds: int = 5,
) -> Rows:
    """Yield the row of each of `calls`, timed in turn; on a GPU with the peak memory of a call beyond its inputs.

    A call that fails, for example for lack of memory, yields a row with the reason.
    """
    failed: dict[str, str] = {}
    for name, times in time_variants(calls, device, rounds, failed=failed).items():
        seconds = times.p50_ms * 1e-3
        row: Row = {
            "case": case,
            "variant": name,
            **asdict(times),
            "gb_per_s": cost.bytes / seconds / 1e9,
            "tflop_per_s": cost.flops / seconds / 1e12,
            **ceilings.shares(cost, seconds),
        }
        if device.type == "cuda" and times.p50_ms < LONG_MS:
            row["enqueue_ms"] = _enqueue_ms(calls[name])
            torch.cuda.synchronize(device)
            if row["enqueue_ms"] > times.p50_ms / 2:
                row.setdefault("suspicious", "may have timed kernel launches on the CPU")
        if device.type == "cuda":
            row["peak_gb"] = peak_on_gpu(calls[name], device) / 1e9
        yield row
    for name, reason in failed.items():
        yield {"case": case, "variant": name, "not_measured": reason}


def bench_case(case: Case, device: torch.device, ceilings: Ceilings) -> Rows:
    """Yield the times of one op's variants in each direction; a failing variant yields a row with the reason."""
    ceilings = ceilings.of(case.op.products)
    arguments = case.arguments(device)
    expected = case.expected(arguments)
    progress = _Progress()
    series = case.op.series(case.sizes) if case.op.series else case.op.name
    for direction, cost in case.costs().items():
        name, reported = f"{case.name} {direction}", {*progress.failed}
        calls = _calls(case, direction, arguments, expected, progress, device)
        for variant in progress.failed.keys() - reported:
            yield {"case": name, "variant": variant, "not_measured": progress.failed[variant]}
        rounds = 2 if cost.seconds(ceilings.copy, ceilings.matmul) > LONG_SECONDS else 5
        for row in timed_rows(name, calls, cost, device, ceilings, rounds):
            if "not_measured" in row:
                yield row
                continue
            note = progress.notes[row["variant"]]
            row |= {"suspicious": "; ".join(filter(None, (row.get("suspicious"), note)))} if note else {}
            if case.op.bound_by == "flops":
                row["share_of_matmul"] = cost.flops / ceilings.matmul / (row["p50_ms"] * 1e-3)
            row |= {"op": f"{series} {direction}", "size": case.size} if series else {}
            yield row | {"ready_s": progress.ready_s[row["variant"]]}


def compile_kernels(group: str, architecture: str) -> Rows:
    """Compile our kernels for all cases in parallel and yield their number; launches then find them in Triton's cache.

    A launch compiles for seconds, one kernel after the other. A kernel that does not compile fails in its own case.
    """
    start = time.perf_counter()
    calls = ((case.op, {**case.sizes, "dtype": torch.bfloat16}) for case in cases(group))
    found = list(distinct_cases(calls, architecture))

    def compile_one(case: KernelCase) -> None:
        with suppress(Exception):
            compile_case(case, architecture)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, found))
    row = {"table": "compilation in parallel, before the first case", "case": f"compile {group}", "variant": OWN}
    yield row | {"compilations": len(found), "ready_s": time.perf_counter() - start}


def kernel_jobs(group: str, device: torch.device, ceilings: Ceilings) -> Iterator[Job]:
    """Yield a job for every op of a group at every shape; on a GPU of an inspected architecture, one that compiles first."""
    if device.type == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if architecture in ARCHITECTURES:
            yield Job(f"compile {group}", partial(compile_kernels, group, architecture))
    for case in cases(group):
        yield Job(case.name, partial(bench_case, case, device, ceilings))
