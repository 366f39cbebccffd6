"""Whole training steps: tokens/s, MFU by the accounting, and peak memory, eager and compiled."""

import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels.device import gpu_of
from ..model.accounting import model_flops_utilisation
from ..train import TrainConfig, preset
from ..train.data import TokenDataset, write_tokens
from ..train.loop import Clock, Trainer


def _random_tokens(path: Path, vocab_size: int, num_tokens: int) -> TokenDataset:
    ids = np.random.default_rng(0).integers(0, vocab_size, num_tokens)
    write_tokens(path, [ids], vocab_size, "random", 0)
    return TokenDataset(path)


def _measure(config: TrainConfig, data: TokenDataset, steps: int, warmup_steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    trainer = Trainer(config, data, data)
    device, gpu = trainer.device, gpu_of(trainer.device)
    trainer.train_step()
    clock = Clock(device)
    clock.lap()
    first_step_s = time.perf_counter() - start
    for _ in range(warmup_steps):
        trainer.train_step()
    clock.lap()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        trainer.train_step()
    tokens_per_second = steps * config.tokens_per_step / clock.lap()
    peak = gpu and gpu.peak_flops("bf16" if trainer.dtype == torch.bfloat16 else "fp32")
    return {
        "tokens_per_s": tokens_per_second,
        "mfu": model_flops_utilisation(config.model, tokens_per_second, peak),
        "first_step_s": first_step_s,
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


def bench_training(
    device: torch.device, names: tuple[str, ...], steps: int = 5, warmup_steps: int = 2
) -> Iterator[dict[str, Any]]:
    """Yield the speed of `steps` training steps of each preset on random tokens: one micro-batch a step."""
    compiled_too = (False, True) if device.type == "cuda" else (False,)
    for name in names:
        base = preset(name)
        micro = base.micro_batch_size or base.batch_size
        with tempfile.TemporaryDirectory() as folder:
            data = _random_tokens(Path(folder) / "random.tokens", base.model.vocab_size, 2**20)
            for compiled in compiled_too:
                config = dataclasses.replace(
                    base, batch_size=micro, micro_batch_size=None, device=str(device), compile=compiled, out=Path(folder)
                )
                row = {
                    "case": f"training {name} batch {micro}x{base.model.context_length}",
                    "variant": "compile" if compiled else "eager",
                }
                try:
                    yield row | _measure(config, data, steps, warmup_steps)
                except torch.cuda.OutOfMemoryError:
                    yield row | {"not_measured": "more memory than there is"}
                torch.compiler.reset()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
