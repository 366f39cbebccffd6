"""Resolve `auto` batch sizes and activation checkpointing from the memory accounting and the size of the GPU's memory."""

import dataclasses
from bisect import bisect_left

import torch

from ..errors import UserError
from ..model.accounting import Policy, largest_batch, num_parameters, training_memory
from ..model.checkpointing import Checkpointing
from .config import TrainConfig
from .device import resolve_device, resolve_dtype

# The rest is reserved for allocator rounding, library workspaces and the CUDA context.
USABLE = 0.9


def needs_memory(config: TrainConfig) -> bool:
    """Return whether `fit_memory` has an `auto` option to resolve."""
    return "auto" in (config.batch_size, config.micro_batch_size, config.activation_checkpointing)


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None for a CPU, whose memory other programs share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class _Memory:
    """Predicts which micro-batches fit in a GPU's memory. It counts sharded tensors in full, which is an upper bound."""

    def __init__(self, config: TrainConfig, memory_bytes: int, checkpointing: Checkpointing) -> None:
        self._model = config.model
        ema = 0 if config.ema_decay is None else 4 * num_parameters(config.model)
        self._limit = USABLE * memory_bytes - ema
        compute = config.precision
        if compute == "auto":
            bfloat16 = resolve_dtype(compute, resolve_device(config.device)) == torch.bfloat16
            compute = "bfloat16" if bfloat16 else "float32"
        # Muon has one momentum, which is counted as two moments.
        self._policy = Policy(
            compute=compute,
            weights=config.weights,
            moments=config.optimizer.states,
            checkpointing=checkpointing,
            vocabulary="padded",
        )

    def largest(self) -> int:
        """Return the largest batch that fits without gradient accumulation, or 0 if none fits."""
        return largest_batch(self._model, self._limit, policy=self._policy)

    def fits(self, micro_batch: int, share: int) -> bool:
        """Return whether micro-batches fit, given the GPU's share of the batch in sequences."""
        memory = training_memory(self._model, micro_batch, policy=self._policy, accumulate=micro_batch < share)
        return memory.peak <= self._limit


def fit_memory(config: TrainConfig, memory_bytes: int | None, num_gpus: int = 1) -> TrainConfig:
    """Replace every `auto` in the configuration with a number, for GPUs with `memory_bytes` of memory each.

    Checkpoint the fewest blocks with which some batch size fits. Then choose the largest batch that fits without gradient
    accumulation, and the largest micro-batch that fits and divides a GPU's share of the batch. Raise a `UserError` if nothing
    fits, or if the memory size is unknown.
    """
    if not needs_memory(config):
        return config
    if memory_bytes is None:
        name = next(n for n in ("batch_size", "micro_batch_size", "activation_checkpointing") if getattr(config, n) == "auto")
        allowed = "none, block or a number" if name == "activation_checkpointing" else "a number"
        raise UserError(f"{name} is auto, which needs a GPU: expected {allowed}")

    def sizes(checkpointing: Checkpointing) -> tuple[int, int] | None:
        return _sizes(config, _Memory(config, memory_bytes, checkpointing), num_gpus)

    chosen = config.activation_checkpointing
    if chosen == "auto":
        # Checkpointing a block never raises the peak, except for the last block: its recomputation follows the loss
        # immediately. The last block is therefore checkpointed only if all the others are not enough.
        layers = config.model.num_layers
        number = bisect_left(range(layers), True, key=lambda blocks: sizes(blocks) is not None)
        chosen = "none" if number == 0 else "block" if number == layers else number
    fitting = sizes(chosen)
    if fitting is None:
        more = "" if chosen == "block" else ", or --activation-checkpointing auto"
        raise UserError(
            f"a step of {config.out.name} does not fit in {memory_bytes / 1e9:.1f} GB: use a smaller model, "
            f"--model.context-length or --micro-batch-size{more}"
        )
    batch_size, micro = fitting
    return dataclasses.replace(config, batch_size=batch_size, micro_batch_size=micro, activation_checkpointing=chosen)


def _sizes(config: TrainConfig, memory: _Memory, num_gpus: int) -> tuple[int, int] | None:
    """Return the batch size and the micro-batch size that fit, or None."""
    given = config.micro_batch_size
    if config.batch_size == "auto":
        most = memory.largest()
        micro = given if isinstance(given, int) else most
        return (num_gpus * micro, micro) if 1 <= micro <= most else None
    share, smallest = config.batch_size // num_gpus, config.smallest_batch // num_gpus
    if given == "auto":
        candidates = [size for size in range(smallest, 0, -1) if smallest % size == 0]
    else:
        candidates = [smallest if given is None else given]
    fitting = next((size for size in candidates if memory.fits(size, share)), None)
    return None if fitting is None else (config.batch_size, fitting)
