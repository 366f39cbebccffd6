"""Find the fastest launch configuration of the attention kernels on the local GPU, and store it as the default."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention
from ..kernels.attention.configurations import (
    Generation,
    Kernel,
    LaunchConfig,
    generation_at,
    key_of,
    read_configurations,
    shipped_configuration,
    use_configuration,
    with_configuration,
    write_configurations,
)
from ..kernels.attention.fused import FUSED_KERNELS
from ..kernels.attention.operands import block_k_of
from ..kernels.inspect import ARCHITECTURES, KernelCase, inspect, launches
from ..kernels.op import ALL, Sizes
from .attention_oracle import TOLERANCE, error_of, exact
from .check import output_gradients
from .jobs import Job
from .options import TuneConfig
from .timing import Times, time_variants

Results = dict[str, Tensor]
Inspector = Callable[[KernelCase, Generation], str | None]
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device, int], Mapping[str, Times]]


def candidates(kernel: Kernel, generation: Generation, block_k: int) -> list[LaunchConfig]:
    """Return the configurations to try: tile sizes, warps and stages, with and without tensor descriptors."""
    if kernel == "backward_fused":
        # The first config selects two kernels with their shipped configurations. Other tiles or more stages spill registers.
        config = LaunchConfig(64, 128, block_k, 4, 2, True)
        return [config, replace(config, gluon=True)]
    # Four warps multiply 64 rows at a time. A looped tile has 8 to 32 KiB, or 64 rows of a small head. For dk and dv, which
    # leave few registers, the minimum is half as large.
    least = min(64, 2**12 // block_k) // (2 if kernel == "backward_kv" else 1)
    looped = [rows for rows in (16, 32, 64, 128) if least <= rows <= 2**14 // block_k]
    kept, stages = ((64, 4), (64, 8), (128, 8)), (2, 3)
    if kernel == "forward":
        kept, stages = ((64, 4), (128, 4), (128, 8), (256, 8)), (2, 3, 4)
    elif kernel == "decode":
        # The number of query rows is known only at launch.
        kept, stages = ((64, 4), (64, 8)), (2, 3, 4)
    descriptors = (False, True) if generation in ("sm_90", "sm_100") and kernel != "decode" else (False,)
    tried = []
    for (keeps, warps), loops, depth, tma in product(kept, looped, stages, descriptors):
        block_m, block_n = (loops, keeps) if kernel == "backward_kv" else (keeps, loops)
        tried.append(LaunchConfig(block_m, block_n, block_k, warps, depth, tma))
    return [*tried, *_in_gluon(kernel, generation, block_k)]


def _in_gluon(kernel: Kernel, generation: Generation, block_k: int) -> Iterator[LaunchConfig]:
    if generation != "sm_90" or kernel == "decode" or block_k < 64:
        return
    # Three groups of four warps have too few registers for wide heads, and for the two accumulators of dk and dv.
    groups = (2, 3) if block_k == 64 and kernel != "backward_kv" else (2,)
    for count, loops, depth in product(groups, (32, 64, 128), (2, 3)):
        block_m, block_n = (loops, 64 * count) if kernel == "backward_kv" else (64 * count, loops)
        yield LaunchConfig(block_m, block_n, block_k, 4, depth, True, gluon=True)


def flaw_of(case: KernelCase, generation: Generation) -> str | None:
    """Return a defect of the compiled kernel that rules it out for a GPU generation, or None."""
    try:
        report = inspect(case, generation)
    except Exception as error:  # the compiler can fail for a shape
        return f"{type(error).__name__}: {error}"[:200]
    limit = ARCHITECTURES[generation].shared_bytes_per_program
    if report.spilled_bytes > 0:
        return f"spills {report.spilled_bytes} bytes"
    return f"takes {report.shared_bytes} bytes of shared memory of {limit}" if report.shared_bytes > limit else None


ATTENTION = ALL["attention"]
# Timed dtype; its configurations also serve float16.
DTYPE = torch.bfloat16
# Kernel name for each tuned configuration.
KERNELS: dict[Kernel, str] = {
    "forward": "attention_forward", "backward_q": "attention_backward_q", "backward_kv": "attention_backward_kv",
    "decode": "attention_decode",
}  # fmt: skip


def tuned_key(kernel: Kernel, generation: Generation, head_dim: int) -> str:
    """Return the key of the tuned configuration; the fused backward kernel has a key of its own."""
    return key_of(generation, kernel, "gluon" if kernel == "backward_fused" else "half", head_dim)


@contextmanager
def use_candidate(key: str, config: LaunchConfig) -> Iterator[None]:
    """Run a block with another configuration; a candidate for one of the two backward kernels disables the fused one."""
    generation, kernel, _, block_k = key.split()
    fused_key = key_of(generation, "backward_fused", "gluon", int(block_k))
    with ExitStack() as stack:
        if kernel in ("backward_q", "backward_kv") and fused_key in read_configurations():
            stack.enter_context(use_configuration(fused_key, replace(read_configurations()[fused_key], gluon=False)))
        stack.enter_context(use_configuration(key, config))
        yield


def sizes_of(kernel: Kernel, head_dim: int) -> Sizes:
    """Return the shape to time a kernel at: causal and long, or a decoding step for many sequences."""
    heads = 2048 // head_dim
    batch, heads, kv_heads, queries, keys = (32, 32, 4, 1, 16_384) if kernel == "decode" else (1, heads, heads, 8192, 8192)
    sizes = {"batch": batch, "num_heads": heads, "num_kv_heads": kv_heads, "num_queries": queries, "num_keys": keys}
    return sizes | {"head_dim": head_dim}


def compiled(
    kernel: Kernel, generation: Generation, key: str, config: LaunchConfig, shapes: Iterable[Sizes]
) -> list[KernelCase]:
    """Return the cases of a kernel at these shapes with another configuration; for the fused kernel, all of its parts."""
    with use_candidate(key, config):
        cases = [case for sizes in shapes for case in launches(ATTENTION, {"dtype": torch.bfloat16, **sizes}, generation)]
    if kernel == "backward_fused":
        return [case for case in cases if case.kernel in FUSED_KERNELS]
    name = f"{KERNELS[kernel]}_hopper" if config.gluon else KERNELS[kernel]
    return [case for case in cases if case.kernel.__name__ == name]


def _name(kernel: Kernel, config: LaunchConfig) -> str:
    if kernel == "backward_fused" and not config.gluon:
        return "two kernels"
    tma = ", in Gluon" if config.gluon else " TMA" if config.tma else ""
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages{tma}"


def _call(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Callable[[], Results]:
    if kernel in ("forward", "decode"):
        return lambda: {"result 0": attention(q.detach(), k.detach(), v.detach())}
    o = attention(q, k, v)
    names = ("gradient 0", "gradient 1", "gradient 2")
    return lambda: dict(zip(names, torch.autograd.grad(o, (q, k, v), do, retain_graph=True), strict=True))


def _with_candidate(key: str, config: LaunchConfig, call: Callable[[], Results]) -> Callable[[], Results]:
    def run() -> Results:
        with use_candidate(key, config):
            return call()

    return run


def _error(run: Callable[[], Results], expected: Results) -> str | None:
    """Return an error in the results, a failure of the call, or None."""
    try:
        for name, result in run().items():
            error = error_of(result, expected[name])
            if not error <= TOLERANCE:  # NaN too
                return f"wrong: error of a token of {name} is {error:.1%}"
    except Exception as error:  # for example more resources than the GPU has
        return f"{type(error).__name__}: {error}"[:200]
    return None


def tune_kernel(
    kernel: Kernel, head_dim: int, device: torch.device, inspector: Inspector = flaw_of, timer: Timer = time_variants
) -> Iterator[dict[str, Any]]:
    """Yield a row for each configuration, fastest first, and write the fastest one without a defect.

    `backward_q` and `backward_kv` are timed together, the other one with its shipped configuration. `backward_fused` is timed
    with the kernels before and after it. An interruption changes nothing.
    """
    generation = generation_at(device)
    key = tuned_key(kernel, generation, head_dim)
    if kernel == "backward_fused" and key not in read_configurations():
        yield {"case": key, "variant": "fused", "not_measured": "no fused backward kernel for this GPU and head dim"}
        return
    shipped = shipped_configuration(key)
    tried = {_name(kernel, config): config for config in (shipped, *candidates(kernel, generation, head_dim))}

    def flaw_of_any(cases: Iterable[KernelCase]) -> str | None:
        return next((f"{case.name}: {flaw}" for case in cases if (flaw := inspector(case, generation))), None)

    with ThreadPoolExecutor() as pool:
        sizes = sizes_of(kernel, head_dim)
        cases = [compiled(kernel, generation, key, config, [sizes]) for config in tried.values()]
        flaws = dict(zip(tried, pool.map(flaw_of_any, cases), strict=True))

    torch.manual_seed(0)
    arguments = ATTENTION.arguments(device, DTYPE, **sizes)
    q, k, v = arguments.positional
    (do,) = output_gradients((q.detach(),))
    expected = exact(arguments, do)
    call = _call(kernel, q, k, v, do)
    calls = {name: _with_candidate(key, config, call) for name, config in tried.items() if flaws[name] is None}
    flaws |= {name: _error(run, expected) for name, run in calls.items()}
    calls = {name: run for name, run in calls.items() if flaws[name] is None}
    times = timer(calls, device, 3)

    def flaw_in_use(name: str) -> str | None:
        # Check every head dim that the configuration would serve, with every option.
        half = [each for each in ATTENTION.compiled if each["dtype"] == torch.bfloat16 and "softcap" not in each]
        served = [each for each in half if block_k_of(each["head_dim"]) == head_dim]
        return flaw_of_any(compiled(kernel, generation, key, tried[name], served))

    ranked = sorted(times, key=lambda name: times[name].p50_ms)
    verdicts: dict[str, str] = {}
    for name in ranked:
        verdicts[name] = flaw_in_use(name) or "chosen"
        if verdicts[name] == "chosen":
            if tried[name] != shipped:
                write_configurations({**read_configurations(), **with_configuration(key, tried[name])})
            break
    costs = ATTENTION.cost(DTYPE.itemsize, **sizes)
    cost = costs.backward if kernel.startswith("backward") else costs.forward
    assert cost is not None
    for name in ranked:
        seconds = times[name].p50_ms * 1e-3
        yield {
            "case": key,
            "variant": name,
            **asdict(times[name]),
            "gb_per_s": cost.bytes / seconds / 1e9,
            "tflop_per_s": cost.flops / seconds / 1e12,
            "shipped": tried[name] == shipped,
            "verdict": verdicts.get(name),
        }
    for name, flaw in flaws.items():
        if flaw is not None:
            yield {"case": key, "variant": name, "not_measured": flaw}


def tune_jobs(config: TuneConfig, device: torch.device) -> Iterator[Job]:
    """Yield a job for each requested head dim and kernel, all kernels of the first head dim first."""
    for head_dim, kernel in product(config.head_dims, config.kernels):
        yield Job(f"tune {kernel} {head_dim}", partial(tune_kernel, kernel, head_dim, device))
