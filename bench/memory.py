"""The peak memory of a call, and of training steps beside what the accounting predicts."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..model.accounting import training_memory
from ..model.checkpointing import Checkpointing
from .jobs import Job, Rows
from .trainers import OWN_POLICY, config_for, random_trainer

# Preset, sequences of a step, checkpointing: small and large, with many activations and with few.
CONFIGURATIONS: tuple[tuple[str, int, Checkpointing], ...] = (
    ("gpt2-small", 8, "none"),
    ("gpt2-small", 32, "none"),
    ("gpt2-small", 32, "block"),
    ("gpt2-medium", 8, "none"),
    ("gpt2-large", 4, 18),
    ("gpt2-large", 4, "block"),
    ("gpt2-xl", 2, "block"),
)
STEPS = 3


def peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes a call holds at most on a GPU, beside those that are held before it."""
    gc.collect()
    # A backward pass may return before autograd's thread has freed its gradients. That thread runs this one after that.
    torch.zeros((), device=device, requires_grad=True).backward()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def peak_row(case: str, predicted: int, measured: int, reserved: int) -> dict:
    """Return a row of what was predicted and measured, in GB; `error` is above 0 where more was held than predicted."""
    figures = {"predicted_gb": predicted / 1e9, "measured_gb": measured / 1e9, "reserved_gb": reserved / 1e9}
    return {"case": case, "variant": "tilewright", **figures, "error": measured / predicted - 1}


def bench_memory(name: str, batch: int, checkpointing: Checkpointing, device: torch.device) -> Rows:
    """Yield the peak of a few eager steps; what was asked for, not what the allocator rounds it up to."""
    config = config_for(name, device, batch, compile=False, activation_checkpointing=checkpointing)
    before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)
    with random_trainer(config) as trainer:
        # From the first step on: the optimizer's state comes with it, the peak after it.
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(STEPS):
            trainer.train_step()
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        dtype = "bfloat16" if trainer.dtype == torch.bfloat16 else "float32"
    predicted = training_memory(
        config.model, batch, policy=replace(OWN_POLICY, compute=dtype, checkpointing=checkpointing)
    ).peak
    case = f"memory {name} batch {batch}x{config.model.context_length}, checkpointing {checkpointing}"
    yield peak_row(case, predicted, stats["requested_bytes.all.peak"] - before, stats["reserved_bytes.all.peak"])


def memory_jobs(device: torch.device) -> Iterator[Job]:
    """Yield the measuring of each configuration."""
    for name, batch, checkpointing in CONFIGURATIONS:
        job = partial(bench_memory, name, batch, checkpointing, device)
        yield Job(f"memory {name} batch {batch}, checkpointing {checkpointing}", job)
