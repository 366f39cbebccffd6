"""Training steps: their speed against the accounting's FLOPs and roofline, and a breakdown of the lost time."""

import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from ..kernels.device import gpu_of
from ..model import ModelConfig
from ..model.accounting import forward_flops_by_group, model_flops, operations, roofline, training_memory
from ..train.graph import EAGER_STEPS
from ..train.profile import breakdown, make_profiler, profiled_events
from ..train.trainer import Trainer
from .jobs import Job, Row, Rows, clean_up
from .timing import quantiles
from .trainers import LLAMA_BLOCKS, OWN_POLICY, VARIANTS, base_config, config_for, counted_flops, random_trainer

LAPS = 5
LAP_SECONDS = 0.2
PROFILED_STEPS = 2
# The rest covers allocator gaps and cuBLAS workspaces. A variant that still does not fit is measured alone.
USABLE_MEMORY = 0.95


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(trainer: Trainer, steps: int) -> float:
    """Return the time of some steps, from an idle device to an idle device."""
    _synchronize(trainer.device)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    _synchronize(trainer.device)
    return time.perf_counter() - start


def _host_seconds(trainer: Trainer) -> float:
    """Return the time in which the host enqueues a step on an idle device, whose queue is empty."""
    _synchronize(trainer.device)
    start = time.perf_counter()
    trainer.train_step()
    return time.perf_counter() - start


def _profile(trainer: Trainer, step_s: float) -> dict[str, float]:
    """Return the share of a step that each group of kernels takes, from a profile of some steps; see `train.profile`."""
    activity, is_gpu = torch.profiler.ProfilerActivity, trainer.device.type == "cuda"
    with make_profiler([activity.CUDA if is_gpu else activity.CPU]) as profiler:
        _seconds(trainer, PROFILED_STEPS)
    if is_gpu and not any(event.device_type == DeviceType.CUDA for event in profiler.events() or ()):
        raise RuntimeError("the profiler recorded no kernel")
    # The profiler slows down a CPU, so shares there are of the profiled steps.
    groups = breakdown(profiled_events(profiler), seconds=PROFILED_STEPS * step_s if is_gpu else None)
    return {name: seconds / sum(groups.values()) for name, seconds in groups.items()}


def lost_shares(shares: Mapping[str, float], ideal: Mapping[str, float]) -> dict[str, float]:
    """Return the share of a step that each group takes beyond its FLOPs at the peak; with the MFU they sum to 1.

    `shares` are the groups' shares of the step's time, `ideal` the shares of products and attention at the peak. A loss is
    negative if attention skips masked scores and needs fewer FLOPs. If no kernel belongs to attention, it ran as products, and
    its FLOPs count as theirs.
    """
    if not shares.get("attention"):
        ideal = {"matmul": sum(ideal.values())}
    return {name: share - ideal.get(name, 0.0) for name, share in shares.items()}


@dataclasses.dataclass
class Entrant:
    """A variant whose trainer has compiled its step, if needed, and run some steps."""

    variant: str
    trainer: Trainer
    lap_steps: int
    ready_s: float
    """Seconds until the end of its first step."""
    peak_gb: float | None
    """Peak memory of this variant in GB; None on a CPU."""
    times_ms: list[float] = dataclasses.field(default_factory=list)
    host_ms: list[float] = dataclasses.field(default_factory=list)
    """Times in which the host enqueues a step; empty on a CPU."""

    def lap(self) -> None:
        """Time some steps."""
        with VARIANTS[self.variant].running():
            self.times_ms.append(1e3 * _seconds(self.trainer, self.lap_steps) / self.lap_steps)
            if self.trainer.device.type == "cuda":
                self.host_ms.append(1e3 * _host_seconds(self.trainer))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def entrant(name: str, variant: str, device: torch.device, batch: int) -> Iterator[Entrant]:
    """Prepare a variant for its laps."""
    entered = VARIANTS[variant]
    config = config_for(name, device, batch, compile=entered.compiled, cuda_graphs=entered.graph, precision=entered.precision)
    # Free the remains of a failed variant now, not during the measurement.
    gc.collect()
    start, before = time.perf_counter(), _allocated(device)
    with random_trainer(config) as trainer:
        with VARIANTS[variant].running():
            _seconds(trainer, 1)
            ready_s = time.perf_counter() - start
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            # The first steps can still select algorithms, and with a graph they run without it.
            step_s = min(_seconds(trainer, 1) for _ in range(EAGER_STEPS + 1 if entered.graph else 2))
        peak_gb = (torch.cuda.max_memory_allocated(device) - before) / 1e9 if device.type == "cuda" else None
        yield Entrant(variant, trainer, max(1, math.ceil(LAP_SECONDS / step_s)), ready_s, peak_gb)


def _speed(case: str, entrant: Entrant, measured: str) -> Row:
    config, times = entrant.trainer.config, quantiles(entrant.times_ms)
    batch, model, step_s = config.batch_size, config.model, times.p50_ms * 1e-3
    assert batch != "auto"
    flops, gpu, peak = model_flops(operations(model, batch)), gpu_of(entrant.trainer.device), _peak(entrant.trainer)
    # The least time assumes this project's kernels for every variant.
    bound_by = dataclasses.replace(OWN_POLICY, compute=VARIANTS[entrant.variant].policy.compute)
    bound = gpu and roofline(model, gpu, batch, policy=bound_by)
    host_ms = quantiles(entrant.host_ms).p50_ms if entrant.host_ms else None
    row: Row = {
        "case": case,
        "variant": entrant.variant,
        **dataclasses.asdict(times),
        "host_ms": host_ms,
        "host_share": host_ms and host_ms / times.p50_ms,
        "tokens_per_s": config.tokens_per_step / step_s,
        "formula_tflop": flops / 1e12,
        "counted_tflop": batch * counted_flops(model) / 1e12,
        "tflop_per_s": flops / step_s / 1e12,
        "mfu": flops / step_s / peak if peak else None,
        "bound_ms": bound.seconds * 1e3 if bound else None,
        "share_of_datasheet": bound.seconds / step_s if bound else None,
        "best_mfu": bound.best_mfu if bound else None,
        "ready_s": entrant.ready_s,
        "peak_gb": entrant.peak_gb,
        "measured": measured,
    }
    if bound and bound.seconds > step_s:
        row["suspicious"] = "above the datasheet: a measuring error"
    return row


def _peak(trainer: Trainer) -> float | None:
    gpu = gpu_of(trainer.device)
    return gpu and gpu.peak_flops(trainer.peak)


def _time_breakdown(case: str, entrant: Entrant) -> Rows:
    trainer, model, batch = entrant.trainer, entrant.trainer.config.model, entrant.trainer.config.batch_size
    assert batch != "auto"
    step_s = quantiles(entrant.times_ms).p50_ms * 1e-3
    with VARIANTS[entrant.variant].running():
        shares = _profile(trainer, step_s)
    row = {"case": case, "variant": entrant.variant}
    yield row | {"table": "time of a step by group", **shares}
    if peak := _peak(trainer):
        mfu = model_flops(operations(model, batch)) / step_s / peak
        attention = 3 * batch * forward_flops_by_group(model)["attention"] / step_s / peak
        losses = lost_shares(shares, {"attention": attention, "matmul": mfu - attention})
        yield row | {"table": "lost MFU by group", "mfu": mfu, **losses}


def _free_memory(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def fit_together(model: ModelConfig, batch: int, device: torch.device, variants: Sequence[str]) -> bool:
    """Return whether the weights and optimizer states of all variants fit in memory with the activations of one."""
    policies = [VARIANTS[variant].policy for variant in variants]
    held = [training_memory(model, batch, policy=policy) for policy in policies]
    states = [memory.weights + memory.master_weights + memory.optimizer_state for memory in held]
    working = max(memory.peak - state for memory, state in zip(held, states, strict=True))
    return sum(states) + working <= USABLE_MEMORY * _free_memory(device)


def _case(name: str, batch: int) -> str:
    return f"training {name} batch {batch}x{base_config(name).model.context_length}"


def _in_turns(name: str, batch: int, device: torch.device, variants: Sequence[str], too_large: list[str]) -> Rows:
    """Yield the rows of variants that run in turn, lap by lap; append variants that exceed the memory to `too_large`."""
    case = _case(name, batch)
    failed: dict[str, str] = {}

    @contextmanager
    def failing_alone(variant: str) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            too_large.append(variant)
        except Exception as error:  # the failure of one variant does not end the others
            failed[variant] = f"{type(error).__name__}: {error}"[:300]

    with ExitStack() as trainers:
        ready: list[Entrant] = []
        for variant in variants:
            with failing_alone(variant):
                each = trainers.enter_context(entrant(name, variant, device, batch))
                ready.append(each)
                if len(variants) > 1:
                    # A preliminary result, in case time runs out while the next variant compiles.
                    each.lap()
                    yield _speed(case, each, "alone") | {"preliminary": True}
                    each.times_ms.clear()
                    each.host_ms.clear()
        for each in ready * LAPS:
            if each.variant not in failed and each.variant not in too_large:
                with failing_alone(each.variant):
                    each.lap()
        ready = [each for each in ready if each.variant not in failed and each.variant not in too_large]
        for each in ready:
            yield _speed(case, each, "in turns" if len(ready) > 1 else "alone")
        for each in ready:
            with failing_alone(each.variant):
                yield from _time_breakdown(case, each)
    for variant, reason in failed.items():
        yield {"case": case, "variant": variant, "not_measured": reason}


def _alone(name: str, batch: int, device: torch.device, variant: str) -> Rows:
    """Yield the rows of one variant; halve the batch until it fits in memory."""
    while batch:
        clean_up(device)
        too_large: list[str] = []
        yield from _in_turns(name, batch, device, [variant], too_large)
        if not too_large:
            return
        yield {"case": _case(name, batch), "variant": variant, "not_measured": "out of memory"}
        batch //= 2


def bench_training(name: str, device: torch.device, variants: Sequence[str], batch_size: int | None = None) -> Rows:
    """Yield the speed of a run's steps on random tokens, at its micro-batch, for all variants in turn if memory allows.

    Otherwise, or for a variant that exceeds the memory, each variant runs alone.
    """
    base = base_config(name)
    batch = batch_size or base.micro_batch_size or base.batch_size
    assert batch != "auto"
    left = [*variants]
    if len(variants) > 1 and fit_together(base.model, batch, device, variants):
        left = []
        yield from _in_turns(name, batch, device, variants, left)
    for variant in left:
        yield from _alone(name, batch, device, variant)


def training_jobs(device: torch.device) -> Iterator[Job]:
    """Yield a job for each model with all variants; on a CPU for the demo's preset only."""
    if device.type != "cuda":
        yield Job("training stories-cpu", partial(bench_training, "stories-cpu", device, ("eager",)))
        return
    # gpt2-xl can take all the time to compile, so it comes last.
    for name in ("gpt2-small", LLAMA_BLOCKS, "tinystories-17m", "gpt2-medium", "gpt2-xl"):
        yield Job(f"training {name}", partial(bench_training, name, device, tuple(VARIANTS)))
