"""Training functions with the signatures of Stanford's CS336, assignment 1, for a training loop of your own.

`AdamW` and `clip_grad_norm_` are PyTorch's. A run of `train` uses its own optimizer, schedule, sampling and checkpoints.
"""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from ..errors import UserError
from ..files import atomic_file, require_file
from .data.sampling import inputs_and_targets
from .data.token_file import TokenDataset
from .schedule import SCHEDULES

__all__ = ["AdamW", "clip_grad_norm_", "cosine_schedule", "get_batch", "load_checkpoint", "save_checkpoint"]


def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, cosine_steps: int) -> float:
    """Return the learning rate of a step: linear from 0 to `max_lr` at `warmup_steps`, then a cosine to `min_lr`.

    The cosine ends at `cosine_steps`; later steps use `min_lr` (Touvron et al. 2023, section 2.2).
    """
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, cosine_steps - warmup_steps))
    return min_lr + (max_lr - min_lr) * SCHEDULES["cosine"](progress)


def get_batch(
    dataset: npt.ArrayLike | TokenDataset,
    batch_size: int,
    context_length: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets at uniformly random positions: (batch_size, context_length) each, int64, on the device.

    dataset: token ids as a 1-D array of integers (also a memory map or a CPU tensor), or a token file. The targets are the
    inputs shifted by one. `generator` is a CPU generator; without one, `torch.manual_seed` determines the positions.
    """
    for name, value in (("batch_size", batch_size), ("context_length", context_length)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected at least 1")
    if not isinstance(dataset, TokenDataset):
        dataset = np.asarray(dataset)
        if dataset.ndim != 1 or not np.issubdtype(dataset.dtype, np.integer):
            raise UserError(f"dataset has shape {dataset.shape} and dtype {dataset.dtype}: expected a 1-D array of integers")
    num_starts = len(dataset) - context_length
    if num_starts < 1:
        raise UserError(f"context_length is {context_length}: expected less than the dataset's {len(dataset)} tokens")
    starts = torch.randint(num_starts, (batch_size,), generator=generator).numpy()
    if isinstance(dataset, TokenDataset):
        windows = dataset.windows(starts, context_length + 1)
    else:
        windows = dataset[starts[:, None] + np.arange(context_length + 1)]
    inputs, targets = inputs_and_targets(windows.astype(np.int64, copy=False))
    return inputs.to(device), targets.to(device)


def save_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: str | os.PathLike[str] | BinaryIO
) -> None:
    """Write the state of the model and the optimizer, and the iteration, to a path or a binary file object.

    A path is replaced only once the whole checkpoint is written.
    """
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": int(iteration)}
    if isinstance(out, str | os.PathLike):
        with atomic_file(Path(out)) as file:
            torch.save(checkpoint, file)
    else:
        torch.save(checkpoint, out)


def load_checkpoint(
    src: str | os.PathLike[str] | BinaryIO, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Restore the model, and the optimizer if given, from `save_checkpoint`; return the iteration.

    Only tensors and plain values are unpickled, so that a checkpoint runs no code. Any other file is a `UserError`.
    """
    if isinstance(src, str | os.PathLike):
        src = require_file(Path(src), "checkpoint")
    try:
        checkpoint = torch.load(src, map_location="cpu", weights_only=True)
        states, iteration = (checkpoint["model"], checkpoint["optimizer"]), checkpoint["iteration"]
    except Exception as error:  # torch.load raises many kinds for bytes that it cannot parse
        raise UserError(f"cannot read the checkpoint {src}: expected a file that save_checkpoint wrote") from error
    model.load_state_dict(states[0])
    if optimizer is not None:
        optimizer.load_state_dict(states[1])
    return iteration
