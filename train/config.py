"""Every option of a training run: the single source of the command line, of a run's `config.json` and of its checks."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite

from ..errors import UserError
from ..files import require_file, write_text
from ..model.config import ModelConfig

ComputeDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from. A text file is encoded once, to a token file (.tokens) beside it."""

    train: Path
    """Training text, or a token file (.tokens)."""
    valid: Path
    """Validation text, or a token file (.tokens)."""
    tokenizer: Path
    """The tokenizer's file."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) under a warm-up and a cosine."""

    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 1e-4
    """Learning rate of the last step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to its peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        _require("optimizer.lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        _require("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"between 0 and lr, {self.lr}")
        _require("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        _require("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "in [0, 1) each")
        _require("optimizer.eps", self.eps, self.eps > 0, "above 0")
        _require("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _require("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    out: Path
    """Folder of the run; made anew."""
    model: ModelConfig
    data: DataConfig
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences of model.context_length tokens a step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_size: int | None = None
    """Sequences a forward pass; fewer than batch_size accumulates gradients. By default the whole batch."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    device: str = "auto"
    """cuda, cpu, or auto: a GPU if there is one."""
    dtype: ComputeDtype = "auto"
    """Of the matrix products; auto takes bfloat16 on GPUs that have it. Weights stay float32."""
    compile: bool | None = None
    """Whether to torch.compile the model; by default on a GPU only."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 250
    """Steps between two validations; the last step is always validated."""
    eval_sequences: int = 1024
    """Sequences a validation, spread evenly over the validation text; the same ones every time."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides the console and metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "log_every",
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        micro = self.batch_size if self.micro_batch_size is None else self.micro_batch_size
        divides = micro >= 1 and self.batch_size % micro == 0
        _require("micro_batch_size", micro, divides, f"a divisor of batch_size, {self.batch_size}")
        in_steps = self.optimizer.warmup_steps < self.steps or self.optimizer.warmup_steps == 0
        _require("optimizer.warmup_steps", self.optimizer.warmup_steps, in_steps, f"below steps, {self.steps}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.model.context_length


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}: it must be {allowed}")


# What may differ when a run goes on: these change what is printed, kept and how fast, not what is learnt.
_FREE_ON_RESUME = {
    "out", "device", "compile", "micro_batch_size", "log_every", "eval_every", "eval_sequences", "checkpoint_every",
    "keep_checkpoints", "tracker", "data",
}  # fmt: skip


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def check_same_run(stored: TrainConfig, wanted: TrainConfig) -> None:
    """Raise a `UserError` where `wanted` would train differently from the stored run."""
    before, after = (_flatten(dataclasses.asdict(config)) for config in (stored, wanted))
    for name, value in before.items():
        if name.split(".")[0] not in _FREE_ON_RESUME and after[name] != value:
            raise UserError(f"the run in {stored.out} has {name} {value}, not {after[name]}: resume it with {value}")


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote; anything unknown, missing or of a wrong type is a `UserError`."""
    require_file(path, "the run's configuration", "is the folder that of a run?")
    try:
        values = json.loads(path.read_text())
        return dacite.from_dict(TrainConfig, values, dacite.Config(type_hooks={Path: Path}, cast=[tuple], strict=True))
    except (ValueError, dacite.DaciteError, AttributeError) as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error
