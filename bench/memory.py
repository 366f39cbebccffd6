"""Peak memory of a call, and of training steps against the accounting's prediction."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from ..model.accounting import training_memory
from ..model.checkpointing import Checkpointing
from ..train.batch_size import device_memory, fit_memory
from .jobs import Job, Rows
from .trainers import OWN_POLICY, config_for, random_trainer

# Preset, sequences per step, checkpointing: small and large models, many and few saved activations. With auto, the largest
# batch that the accounting expects to fit, as in `tilewright train --batch-size auto`.
CONFIGURATIONS: tuple[tuple[str, int | Literal["auto"], Checkpointing], ...] = (
    ("gpt2-small", 8, "none"),
    ("gpt2-small", 32, "none"),
    ("gpt2-small", 32, "block"),
    ("gpt2-medium", 8, "none"),
    ("gpt2-large", 4, 18),
    ("gpt2-large", 4, "block"),
    ("gpt2-xl", 2, "block"),
    ("gpt2-small", "auto", "none"),
    ("gpt2-small", "auto", "block"),
    ("gpt2-xl", "auto", "none"),
    ("gpt2-xl", "auto", "block"),
)
STEPS = 2


def peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of a call on a GPU, minus the bytes allocated before."""
    gc.collect()
    # A backward pass can return before autograd's thread has freed its gradients. This one follows in that thread.
    torch.zeros((), device=device, requires_grad=True).backward()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def peak_row(case: str, predicted: int, measured: int, reserved: int) -> dict:
    """Return a row of predicted and measured memory in GB; `error` is positive if the measurement is larger."""
    figures = {"predicted_gb": predicted / 1e9, "measured_gb": measured / 1e9, "reserved_gb": reserved / 1e9}
    return {"case": case, "variant": "tilewright", **figures, "error": measured / predicted - 1}


def bench_memory(name: str, batch: int | Literal["auto"], checkpointing: Checkpointing, device: torch.device) -> Rows:
    """Yield the peak of a few eager steps, in requested bytes without the allocator's rounding."""
    config = config_for(name, device, batch, compile=False, activation_checkpointing=checkpointing)
    config = fit_memory(config, device_memory(device))
    assert config.batch_size != "auto"
    before = torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0)
    with random_trainer(config) as trainer:
        # Count from the first step on, which creates the optimizer's state; the peak follows in the second.
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(STEPS):
            trainer.train_step()
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        dtype = "bfloat16" if trainer.dtype == torch.bfloat16 else "float32"
    policy = replace(OWN_POLICY, compute=dtype, checkpointing=checkpointing)
    predicted = training_memory(config.model, config.batch_size, policy=policy).peak
    size = f"{'largest ' * (batch == 'auto')}batch {config.batch_size}x{config.model.context_length}"
    case = f"memory {name} {size}, checkpointing {checkpointing}"
    yield peak_row(case, predicted, stats["requested_bytes.all.peak"] - before, stats["reserved_bytes.all.peak"])


def memory_jobs(device: torch.device) -> Iterator[Job]:
    """Yield a job for each configuration."""
    for name, batch, checkpointing in CONFIGURATIONS:
        job = partial(bench_memory, name, batch, checkpointing, device)
        yield Job(f"memory {name} batch {batch}, checkpointing {checkpointing}", job)
