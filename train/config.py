"""Every option of a training run: the single source of the command line, of a run's `config.json` and of its checks."""

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import dacite

from ..errors import UserError
from ..files import require_file, write_text
from ..model.config import ModelConfig

ComputeDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from. A text file is encoded once, to a token file (.tokens) beside it."""

    train: tuple[Path, ...]
    """Training texts, chats (JSON lines with messages), or token files (.tokens)."""
    valid: Path
    """Validation text or chats, or a token file (.tokens)."""
    tokenizer: Path
    """The tokenizer's file."""
    weights: tuple[float, ...] | None = None
    """Share of the sequences that come from each training file, in their order; by default in proportion to its length."""
    documents: bool = False
    """Whether attention stays inside each document, as end-of-text tokens bound them; in chats it always stays inside each
    conversation."""
    chat_template: Path | None = None
    """File of the chat template; by default that of the tokenizer's folder."""

    def __post_init__(self) -> None:
        _require("data.train", self.train, len(self.train) >= 1, "at least one file")
        weights = self.weights
        if weights is not None:
            fits = len(weights) == len(self.train) and all(0 < weight < math.inf for weight in weights)
            _require(
                "data.weights", weights, fits, f"one finite number above 0 for each of the {len(self.train)} training files"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024) under a warm-up and a decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks by Muon, with updates as large as AdamW's; all else by AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 1e-4
    """Learning rate of the last step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    """How the learning rate falls from its peak: half a cosine; constant, then a line over decay_share; a line all the way."""
    decay_share: float = 0.2
    """Share of the steps over which wsd falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        _require_choices(self, "optimizer.")
        _require("optimizer.lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        _require("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"between 0 and lr, {self.lr}")
        _require("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        _require("optimizer.decay_share", self.decay_share, 0 < self.decay_share <= 1, "above 0, at most 1")
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
    batch_size: int | Literal["auto"]
    """Sequences of model.context_length tokens a step; auto takes as many as fit in the GPU's memory by the accounting."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences a forward pass of one GPU; fewer than its share of the batch accumulates gradients. By default the whole share;
    auto takes the largest divisor that fits in the GPU's memory by the accounting."""
    activation_checkpointing: Literal["none", "block", "auto"] | int = "none"
    """Blocks that keep only their inputs and run again in the backward pass. block: every one; a number: so many, from the
    first on; auto: as few as the GPU's memory demands by the accounting."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser of the logits in the loss (Chowdhery et al. 2022, section 5)."""
    router_loss: float = 0.01
    """Weight of the loss that spreads tokens over the experts of each layer (Fedus et al. 2021, eq. 4), where there are any."""
    ema_decay: float | None = None
    """Keep a mean of the weights that forgets at this rate a step; validation and generation then use it."""
    spike_deviations: float | None = 6.0
    """Skip a step whose loss lies more standard deviations than this above the mean of the last 128; None skips only what is
    not finite."""
    max_skipped_steps: int = 10
    """Skipped steps in a row after which the run stops."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: every GPU holds the model; fsdp: each holds a shard of it."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    init: Path | None = None
    """Begin with the weights of another run, or of a folder of Hugging Face's, in place of random ones."""
    device: str = "auto"
    """cuda, cpu, or auto: a GPU if there is one."""
    dtype: ComputeDtype = "auto"
    """Of the matrix products; auto takes bfloat16 on GPUs that have it. Weights stay float32."""
    compile: bool | None = None
    """Whether to torch.compile the model; by default on a GPU only."""
    cuda_graphs: bool = False
    """Whether a compiled step is recorded and replayed as CUDA graphs, which removes what launches cost; not with gradients
    that are accumulated."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 250
    """Steps between two validations; the last step is always validated."""
    eval_sequences: int = 1024
    """Sequences a validation, spread evenly over the validation text; the same ones every time."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk, beside the one with the lowest validation loss."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides the console and metrics.jsonl."""

    def __post_init__(self) -> None:
        _require_choices(self)
        for name in (
            "steps",
            "batch_size",
            "log_every",
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            _require(name, value, value == "auto" or value >= 1, "at least 1")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        for name in ("z_loss", "router_loss"):
            value = getattr(self, name)
            _require(name, value, 0 <= value < math.inf, "0 or a finite number above it")
        _require("ema_decay", self.ema_decay, self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1")
        deviations = self.spike_deviations
        _require("spike_deviations", deviations, deviations is None or deviations > 0, "above 0")
        blocks, most = self.activation_checkpointing, self.model.num_layers
        known = 0 <= blocks <= most if type(blocks) is int else blocks in ("none", "block", "auto")
        _require("activation_checkpointing", blocks, known, f"none, block, auto, or a number of blocks, at most {most}")
        micro = self.micro_batch_size
        if micro is not None and micro != "auto":
            divides = micro >= 1 and (self.batch_size == "auto" or self.batch_size % micro == 0)
            _require("micro_batch_size", micro, divides, f"a divisor of batch_size, {self.batch_size}")
        if self.cuda_graphs:
            _require("compile", self.compile, self.compile is not False, "left out, or true, where cuda_graphs is set")
            # A graph leaves its gradients where its next replay writes (pytorch/pytorch#169545).
            at_once = self.batch_size == "auto" or micro in (None, "auto", self.batch_size)
            _require("micro_batch_size", micro, at_once, f"left out, or {self.batch_size}, where cuda_graphs is set")
        in_steps = self.optimizer.warmup_steps < self.steps or self.optimizer.warmup_steps == 0
        _require("optimizer.warmup_steps", self.optimizer.warmup_steps, in_steps, f"below steps, {self.steps}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, where batch_size is a number."""
        assert self.batch_size != "auto"
        return self.batch_size * self.model.context_length


def _require_choices(config: Any, prefix: str = "") -> None:
    # The command line and the files are checked by their types; a configuration made in Python is not.
    for option in dataclasses.fields(config):
        if get_origin(option.type) is Literal:
            value, choices = getattr(config, option.name), get_args(option.type)
            _require(prefix + option.name, value, value in choices, f"one of {', '.join(choices)}")


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}: it must be {allowed}")


# What may differ when a run goes on: these change what is printed, kept and how fast, not what is learnt.
_FREE_ON_RESUME = {
    "out", "device", "compile", "micro_batch_size", "log_every", "eval_every", "eval_sequences", "checkpoint_every",
    "keep_checkpoints", "tracker", "data.train", "data.valid", "data.tokenizer", "data.chat_template",
    "activation_checkpointing",
    "max_skipped_steps", "parallel", "cuda_graphs", "init",
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
        if name not in _FREE_ON_RESUME and after[name] != value:
            raise UserError(f"the run in {stored.out} has {name} {value}, not {after[name]}: resume it with {value}")


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def _from_json(values: dict[str, Any]) -> TrainConfig:
    return dacite.from_dict(TrainConfig, values, dacite.Config(type_hooks={Path: Path}, cast=[tuple], strict=True))


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Return `config` with options such as "optimizer.lr" set to values of JSON; what does not fit is a `UserError`."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    known = _flatten(values)
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UserError(f"option {name!r} is unknown" + (f": perhaps {', '.join(near)}" if near else ""))
        *groups, last = name.split(".")
        functools.reduce(dict.__getitem__, groups, values)[last] = value
    try:
        return _from_json(values)
    except (ValueError, TypeError, dacite.DaciteError) as error:
        raise UserError(f"{', '.join(f'{name} {value}' for name, value in options.items())} cannot be used: {error}") from error


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote; anything unknown, missing or of a wrong type is a `UserError`."""
    require_file(path, "the run's configuration", "is the folder that of a run?")
    try:
        return _from_json(json.loads(path.read_text()))
    except (ValueError, dacite.DaciteError, AttributeError) as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error
