"""Whole training steps: their speed beside the accounting's FLOPs and roofline, and where the rest of the peak is lost."""

import dataclasses
import gc
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import use_backend
from ..kernels.device import gpu_of
from ..kernels.dispatch import Backend
from ..model import ModelConfig, TransformerLM
from ..model.accounting import Policy, forward_flops_by_group, model_flops, operations, roofline
from ..train import TrainConfig, preset
from ..train.data.sampling import TrainingData
from ..train.data.token_file import TokenDataset, write_tokens
from ..train.device import resolve_device
from ..train.profile import breakdown, profiled_events
from ..train.trainer import Trainer
from .jobs import Job, Row, Rows
from .timing import quantiles

VARIANTS: Mapping[str, tuple[Backend, bool]] = {
    "eager": ("reference", False),
    "compile + kernels": ("auto", True),
    "compile": ("reference", True),
}
"""Which backend the kernels have, and whether the step is compiled."""
# The model as it is: its vocabulary padded.
OWN_POLICY = Policy(vocabulary="padded")
LAPS = 5
LAP_SECONDS = 0.2
PROFILED_STEPS = 2


@contextmanager
def random_trainer(config: TrainConfig) -> Iterator[Trainer]:
    """Make a trainer on random tokens, without a run's folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.tokens"
        write_tokens(path, [np.random.default_rng(0).integers(0, config.model.vocab_size, 2**20)], config.model.vocab_size)
        data = TokenDataset(path)
        samples = TrainingData((data,), config.model.context_length, config.seed)
        # Weights are drawn where they are needed: a CPU takes longer for billions of them than the steps take.
        with resolve_device(config.device):
            trainer = Trainer(config, samples, data)
        try:
            yield trainer
        finally:
            trainer.close()


def config_for(name: str, device: torch.device, batch_size: int, **changes: Any) -> TrainConfig:
    """Return a preset with one micro-batch of `batch_size` sequences a step."""
    return dataclasses.replace(preset(name), batch_size=batch_size, micro_batch_size=None, device=str(device), **changes)


@cache
def counted_flops(model: ModelConfig) -> int:
    """Return the FLOPs of one sequence, forward and backward, as PyTorch counts them, on tensors that hold nothing."""
    with torch.device("meta"):
        meta = TransformerLM(model)
        tokens = torch.zeros(1, model.context_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        meta(tokens).sum().backward()
    return counter.get_total_flops()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(trainer: Trainer, steps: int) -> float:
    """Return the time of some steps, begun and ended on an idle device."""
    _synchronise(trainer.device)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    _synchronise(trainer.device)
    return time.perf_counter() - start


def _profile(trainer: Trainer, step_s: float) -> dict[str, float]:
    """Return which share of a step each group of kernels takes, by a profile of a few; see `train.profile`."""
    activity, is_gpu = torch.profiler.ProfilerActivity, trainer.device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if is_gpu else activity.CPU]) as profiler:
        _seconds(trainer, PROFILED_STEPS)
    # On a CPU the profiler slows down what it looks at: shares are then of the steps that it saw.
    groups = breakdown(profiled_events(profiler), seconds=PROFILED_STEPS * step_s if is_gpu else None)
    return {name: seconds / sum(groups.values()) for name, seconds in groups.items()}


def lost_shares(shares: Mapping[str, float], ideal: Mapping[str, float]) -> dict[str, float]:
    """Return which share of a step each group takes beyond its FLOPs at the peak; with the MFU they sum up to 1.

    `shares` are those of the groups in the step's time, `ideal` the shares that products and attention would take at the peak.
    Attention that skips what causality masks may need less: its loss is then negative. Where no kernel is attention's, it was
    written out in products, and its FLOPs are theirs.
    """
    if not shares.get("attention"):
        ideal = {"matmul": sum(ideal.values())}
    return {name: share - ideal.get(name, 0.0) for name, share in shares.items()}


def _measure(config: TrainConfig, case: str, variant: str) -> Rows:
    batch, model = config.batch_size, config.model
    assert batch != "auto"
    start = time.perf_counter()
    with random_trainer(config) as trainer:
        device, gpu = trainer.device, gpu_of(trainer.device)
        _seconds(trainer, 1)
        ready_s = time.perf_counter() - start
        steps = max(1, math.ceil(LAP_SECONDS / _seconds(trainer, 1)))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = quantiles([1e3 * _seconds(trainer, steps) / steps for _ in range(LAPS)])
        step_s = times.p50_ms * 1e-3
        peak_memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
        flops = model_flops(operations(model, batch))
        peak = gpu and gpu.peak_flops("bf16" if trainer.dtype == torch.bfloat16 else "fp32")
        bound = gpu and roofline(model, gpu, batch, policy=OWN_POLICY)
        row: Row = {
            "case": case,
            "variant": variant,
            **dataclasses.asdict(times),
            "tokens_per_s": config.tokens_per_step / step_s,
            "formula_tflop": flops / 1e12,
            "counted_tflop": batch * counted_flops(model) / 1e12,
            "tflop_per_s": flops / step_s / 1e12,
            "mfu": flops / step_s / peak if peak else None,
            "bound_ms": bound.seconds * 1e3 if bound else None,
            "share_of_datasheet": bound.seconds / step_s if bound else None,
            "best_mfu": bound.best_mfu if bound else None,
            "ready_s": ready_s,
            "peak_gb": peak_memory,
        }
        if bound and bound.seconds > step_s:
            row["suspicious"] = "above the datasheet: a measuring error"
        yield row
        shares = _profile(trainer, step_s)
    yield {"case": case, "variant": variant, "table": "where the time of a step goes", **shares}
    if peak:
        mfu = flops / step_s / peak
        attention = 3 * batch * forward_flops_by_group(model)["attention"] / step_s / peak
        losses = {"mfu": mfu, **lost_shares(shares, {"attention": attention, "matmul": mfu - attention})}
        yield {"case": case, "variant": variant, "table": "what the MFU is lost to", **losses}


def bench_training(name: str, variant: str, device: torch.device, batch_size: int | None = None) -> Rows:
    """Yield the speed of a preset's steps on random tokens, at its micro-batch, or half of it as often as memory demands."""
    base = preset(name)
    backend, compiled = VARIANTS[variant]
    batch = batch_size or base.micro_batch_size or base.batch_size
    assert batch != "auto"
    while batch:
        case = f"training {name} batch {batch}x{base.model.context_length}"
        try:
            with use_backend(backend):
                yield from _measure(config_for(name, device, batch, compile=compiled), case, variant)
            return
        except torch.cuda.OutOfMemoryError:
            yield {"case": case, "variant": variant, "not_measured": "more memory than there is"}
        # Outside of the handler, which keeps the tensors of the step alive.
        gc.collect()
        torch.cuda.empty_cache()
        batch //= 2


def training_jobs(device: torch.device) -> Iterator[Job]:
    """Yield the measuring of each preset in each form; on a CPU the demo's as it runs there."""
    if device.type != "cuda":
        yield Job("training stories-cpu", partial(bench_training, "stories-cpu", "eager", device))
        return
    # Compiling gpt2-xl may take all the time that there is: what is known sooner comes first.
    for name in ("gpt2-small", "gpt2-xl", "tinystories-17m"):
        for variant in VARIANTS:
            yield Job(f"training {name}, {variant}", partial(bench_training, name, variant, device))
