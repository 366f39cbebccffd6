"""Batch sizes and checkpointing that the accounting works out from the memory of the GPU, where a run says `auto`."""

import dataclasses
from bisect import bisect_left

import torch

from ..errors import UserError
from ..model.accounting import Policy, largest_batch, num_parameters, training_memory
from ..model.checkpointing import Checkpointing
from .config import TrainConfig
from .device import resolve_device, resolve_dtype

# What is left to the allocator's rounding, the libraries' workspaces and the CUDA context.
USABLE = 0.9


def needs_memory(config: TrainConfig) -> bool:
    """Return whether `fit_memory` has anything to decide."""
    return "auto" in (config.batch_size, config.micro_batch_size, config.activation_checkpointing)


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None for a CPU, whose memory is not a run's alone."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


class _Memory:
    """Which micro-batches fit in a GPU's memory. Shards are counted as if whole, which errs on the safe side."""

    def __init__(self, config: TrainConfig, memory_bytes: int, checkpointing: Checkpointing) -> None:
        self._model = config.model
        ema = 0 if config.ema_decay is None else 4 * num_parameters(config.model)
        self._limit = USABLE * memory_bytes - ema
        compute = config.precision
        if compute == "auto":
            bfloat16 = resolve_dtype(compute, resolve_device(config.device)) == torch.bfloat16
            compute = "bfloat16" if bfloat16 else "float32"
        # Muon's single momentum is counted as two moments.
        self._policy = Policy(
            compute=compute,
            weights=config.weights,
            moments=config.optimizer.states,
            checkpointing=checkpointing,
            vocabulary="padded",
        )

    def largest(self) -> int:
        """Return the largest batch that fits without accumulation, 0 where none does."""
        return largest_batch(self._model, self._limit, policy=self._policy)

    def fits(self, micro_batch: int, share: int) -> bool:
        """Return whether micro-batches of a GPU's share of the batch fit."""
        memory = training_memory(self._model, micro_batch, policy=self._policy, accumulate=micro_batch < share)
        return memory.peak <= self._limit


def fit_memory(config: TrainConfig, memory_bytes: int | None, num_gpus: int = 1) -> TrainConfig:
    """Return the configuration with numbers in place of every `auto`, for GPUs of `memory_bytes` each.

    As few blocks are checkpointed as let any size fit that is left to choose. Then a batch is the largest that fits without
    accumulation, a micro-batch the largest divisor of a GPU's share of the batch that fits. Where nothing fits at all, or the
    memory is not known, a `UserError`.
    """
    if not needs_memory(config):
        return config
    if memory_bytes is None:
        name = next(n for n in ("batch_size", "micro_batch_size", "activation_checkpointing") if getattr(config, n) == "auto")
        instead = "choose none, block or a number" if name == "activation_checkpointing" else "give a number"
        raise UserError(f"{name} is auto: that needs a GPU, whose memory is known; {instead}")

    def sizes(checkpointing: Checkpointing) -> tuple[int, int] | None:
        return _sizes(config, _Memory(config, memory_bytes, checkpointing), num_gpus)

    chosen = config.activation_checkpointing
    if chosen == "auto":
        # Each block but the last spares memory, or costs none. The last runs again as soon as the loss is done, and spares some
        # only until then: it comes in question where all the others are not enough.
        layers = config.model.num_layers
        number = bisect_left(range(layers), True, key=lambda blocks: sizes(blocks) is not None)
        chosen = "none" if number == 0 else "block" if number == layers else number
    fitting = sizes(chosen)
    if fitting is None:
        more = "" if chosen == "block" else ", or --activation-checkpointing auto"
        raise UserError(
            f"a step of {config.out.name} does not fit in {memory_bytes / 1e9:.1f} GB: choose a smaller model, "
            f"--model.context-length or --micro-batch-size{more}"
        )
    batch_size, micro = fitting
    return dataclasses.replace(config, batch_size=batch_size, micro_batch_size=micro, activation_checkpointing=chosen)


def _sizes(config: TrainConfig, memory: _Memory, num_gpus: int) -> tuple[int, int] | None:
    """Return the batch and the micro-batch that fit, or None."""
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
