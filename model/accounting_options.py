"""Options of the accounting. This module does not import torch, so help and option errors are fast."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..datasheet import GPUS, find_gpu
from ..errors import UserError
from .config import MODELS, ModelConfig, pad_vocabulary
from .huggingface import read_config
from .memory_size import parse_memory
from .policy import Policy

# Larger values overflow the figures, and no run needs them.
_MAX_VALUE, _MIN_MFU = 10**18, 1e-6


@dataclass(frozen=True)
class AccountConfig:
    """Options of `account`."""

    context_length: int | None = None
    """Tokens per sequence; by default the model's context length."""
    batch_size: int | Literal["auto"] = 1
    """Sequences per GPU; auto: the largest batch that fits in --memory."""
    memory: str | None = None
    """Memory of the GPU with its unit: 80GB is 80e9 bytes, 80GiB is 80 x 2^30."""
    gpu: str | None = None
    """GPU, such as h200 or "h100 pcie"."""
    num_gpus: int = 1
    """GPUs of the run; they share its tokens."""
    mfu: float = 0.4
    """Planned model FLOPs utilization, if --tokens-per-second is not given."""
    tokens_per_second: float | None = None
    """Measured speed of all GPUs together; the report lists its MFU by every convention."""
    tokens: int | None = None
    """Tokens of the run; by default 20 per active parameter (Hoffmann et al. 2022)."""
    price_per_gpu_hour: float | None = None
    """Price of one GPU for an hour, in any currency."""
    vocab_multiple: int = 1
    """Round the vocabulary up to a multiple of this, such as 64."""
    policy: Policy = dataclasses.field(default_factory=Policy)
    """Choices of the training step: dtypes, kernels, checkpointing."""
    json: bool = False
    """Print JSON instead of tables."""
    plot: Path | None = None
    """Path of a PNG: FLOPs by model size and context, and memory over a step."""

    def __post_init__(self) -> None:
        for name in ("context_length", "batch_size", "num_gpus", "tokens", "vocab_multiple"):
            value = getattr(self, name)
            if value not in (None, "auto") and not 1 <= value <= _MAX_VALUE:
                raise UserError(f"{name} is {value}: expected from 1 to {_MAX_VALUE:.0e}")
        if not _MIN_MFU <= self.mfu <= 1:
            raise UserError(f"mfu is {self.mfu}: expected from {_MIN_MFU:g} to 1")
        memory = None if self.memory is None else parse_memory(self.memory)
        if self.batch_size == "auto" and memory is None:
            raise UserError("batch_size auto needs --memory, such as 80GB (80e9 bytes) or 80GiB")
        if self.gpu is not None and find_gpu(self.gpu) is None:
            raise UserError(f"gpu is {self.gpu!r}: expected one of {', '.join(gpu.name for gpu in GPUS.values())}")
        speed, price = self.tokens_per_second, self.price_per_gpu_hour
        if speed is not None and not 1 / _MAX_VALUE <= speed <= _MAX_VALUE:
            raise UserError(f"tokens_per_second is {speed}: expected above 0 and at most {_MAX_VALUE:.0e}")
        if price is not None and not 0 <= price <= _MAX_VALUE:
            raise UserError(f"price_per_gpu_hour is {price}: expected from 0 to {_MAX_VALUE:.0e}")
        for name in ("tokens", "tokens_per_second", "price_per_gpu_hour"):
            if self.gpu is None and getattr(self, name) is not None:
                raise UserError(f"{name} needs the peak of a GPU: name one with --gpu")


def model_of(name: str, settings: AccountConfig) -> ModelConfig:
    """Return the shape of the preset `name`, or of the Hugging Face folder `name`, with its vocabulary padded.

    Raises a `UserError` that lists the presets if the name is unknown.
    """
    if name in MODELS:
        return pad_vocabulary(MODELS[name], settings.vocab_multiple)
    if not name or not Path(name).is_dir():
        raise UserError(f"preset {name!r} is unknown: expected one of {', '.join(MODELS)}, or a folder with a config.json")
    return pad_vocabulary(read_config(Path(name)), settings.vocab_multiple)
