"""Options of a training run. They define the command line, a run's `config.json` and the checks of values."""

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..errors import UserError
from ..fields import check_fields
from ..files import require_file, write_text
from ..model.config import ModelConfig

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"

Resume = Literal["auto"] | Path
"""auto: resume from the newest valid checkpoint, or start a run in an empty folder; a path: resume from this checkpoint."""
Extend = float | Literal["keep"]
"""keep: batch size and data may change, and the schedule continues; a number: restart the schedule from this learning rate."""

# Scales of FP8 tensors: fp8: per tensor; fp8_rowwise: per row; fp8_delayed: per tensor, from earlier steps. All computation
# other than the matrix products of the blocks is bfloat16.
Precision = Literal["auto", "float32", "bfloat16", "fp8", "fp8_rowwise", "fp8_delayed"]

# Metadata that states whether an option may change when a run resumes. Without metadata it may not.
FREE = {"on_resume": "free"}
"""May change: it does not affect the trained weights, only output and speed."""
GROWS = {"on_resume": "grows"}
"""May change with `extend`."""
RESTARTS = {"on_resume": "restarts"}
"""May change only with a learning rate as `extend`, because it defines the schedule."""


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data. Each text file is encoded once, to a token file (.tokens) in the same folder."""

    train: tuple[Path, ...] = field(metadata=FREE)
    """Training data: texts, chats (JSON lines), token files (.tokens) or folders of token shards. Each entry is a source."""
    valid: Path = field(metadata=FREE)
    """Validation data: a text, chats, or a token file (.tokens)."""
    tokenizer: Path = field(metadata=FREE)
    """Tokenizer file."""
    names: tuple[str, ...] | None = field(default=None, metadata=FREE)
    """Name of each source; with names, the training loss of each source is logged."""
    source_valid: tuple[Path, ...] | None = field(default=None, metadata=FREE)
    """Validation data of each source, in the order of train; the loss of each is logged in addition to the loss on valid."""
    weights: tuple[float, ...] | None = field(default=None, metadata=GROWS)
    """Fraction of the sequences drawn from each source, in the order of train; by default proportional to its length."""
    documents: bool = False
    """Mask attention between documents, which end-of-text tokens separate. Attention between chats is always masked."""
    packing: Literal["none", "best_fit"] = "none"
    """none: cut the concatenated documents into sequences; best_fit: fill sequences with whole documents."""
    chat_template: Path | None = field(default=None, metadata=FREE)
    """File with the chat template; by default the template in the tokenizer's folder."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        _require("data.train", self.train, len(self.train) >= 1, "at least one file")
        weights = self.weights
        if weights is not None:
            fits = len(weights) == len(self.train) and all(0 < weight < math.inf for weight in weights)
            _require("data.weights", weights, fits, f"a finite number above 0 for each of the {len(self.train)} training files")
        names, valid, count = self.source_names, self.source_valid, len(self.train)
        if names is not None:
            fits = len(names) == len(set(names)) == count and all(name and "/" not in name for name in names)
            _require("data.names", names, fits, f"distinct names without / for each of the {count} training files")
        paths = None if valid is None else ", ".join(map(str, valid))
        _require("data.source_valid", paths, valid is None or len(valid) == count, f"one file for each of the {count} sources")

    @property
    def source_names(self) -> tuple[str, ...] | None:
        """Name of each source, by default the stem of its file; None if no losses by source are logged."""
        if self.names is not None or self.source_valid is None:
            return self.names
        return tuple(path.stem for path in self.train)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: AdamW (Loshchilov & Hutter 2019), Muon (Jordan et al. 2024) or schedule-free AdamW (Defazio et al. 2024)."""

    name: Literal["adamw", "muon", "schedule_free"] = "adamw"
    """Optimizer. muon: Muon for the blocks' matrices, AdamW for the rest; schedule_free: AdamW with averaged weights."""
    states: Literal["float32", "8bit"] = "float32"
    """Storage format of AdamW's moments."""
    lr: float = field(default=1e-3, metadata=RESTARTS)
    """Peak learning rate."""
    final_lr: float = field(default=1e-4, metadata=RESTARTS)
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 100
    """Number of steps in which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = field(default="cosine", metadata=RESTARTS)
    """Decay after the warm-up. cosine: half a cosine; wsd: linear over the last decay_share; linear; constant: no decay."""
    decay_share: float = field(default=0.2, metadata=RESTARTS)
    """Fraction of the steps in which wsd decays the learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms have no weight decay."""
    max_grad_norm: float = 1.0
    """Maximum global gradient norm; larger gradients are scaled down."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        _require("optimizer.lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        _require("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"0 to lr, {self.lr}")
        _require("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        _require("optimizer.decay_share", self.decay_share, 0 < self.decay_share <= 1, "a number above 0, at most 1")
        _require("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        fits = self.states == "float32" or self.name == "adamw"
        _require("optimizer.states", self.states, fits, "float32 unless optimizer.name is adamw")
        if self.name == "schedule_free":
            # Averaging the weights replaces the decay.
            constant = self.schedule == "constant"
            _require("optimizer.schedule", self.schedule, constant, "constant if optimizer.name is schedule_free")
            _require(
                "optimizer.betas", self.betas, self.betas[0] > 0, "a first beta above 0 if optimizer.name is schedule_free"
            )
        _require("optimizer.eps", self.eps, 0 < self.eps < math.inf, "a finite number above 0")
        finite = 0 <= self.weight_decay < math.inf
        _require("optimizer.weight_decay", self.weight_decay, finite, "a finite number of at least 0")
        _require("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "a number above 0")


@dataclass(frozen=True)
class Change:
    """The changes that an extension makes to a run."""

    step: int
    """Number of steps taken before the change."""
    changes: dict[str, Any]
    """Old and new value of each option, such as "batch_size", as JSON values. "optimizer.lr" marks a restart of the schedule,
    and "data.train" a change of the data, even if the values are equal."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {_short(before)} \u2192 {_short(after)}" for name, (before, after) in self.changes.items())


def _short(value: Any) -> str:
    # Shorten paths to file names.
    return " ".join(Path(str(item)).name for item in value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    out: Path = field(metadata=FREE)
    """Folder of the run, which is created."""
    model: ModelConfig
    data: DataConfig
    steps: int = field(metadata=GROWS)
    """Number of optimizer steps."""
    batch_size: int | Literal["auto"] = field(metadata=GROWS)
    """Number of sequences of model.context_length tokens per step; auto: as many as fit in the GPU's memory."""
    batch_start: int | None = field(default=None, metadata=GROWS)
    """Sequences in the first step, doubled until they reach batch_size (Merrill et al. 2025); without it, no batch warm-up."""
    batch_warmup_steps: int = field(default=0, metadata=GROWS)
    """Length of the batch warm-up in steps, divided equally among the sizes below batch_size."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_size: int | Literal["auto"] | None = field(default=None, metadata=FREE)
    """Sequences per forward pass of a GPU; default: its share of the batch; auto: the largest divisor that fits in memory."""
    activation_checkpointing: Literal["none", "block", "auto"] | int = field(default="none", metadata=FREE)
    """Blocks to recompute in the backward pass. block: all; N: the first N; auto: as few as the GPU's memory allows."""
    z_loss: float = 0.0
    """Weight of the z-loss, the squared log-normalizer of the logits (Chowdhery et al. 2022, section 5)."""
    router_loss: float = 0.01
    """Weight of the load-balancing loss of models with experts (Fedus et al. 2021, eq. 4)."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, used by validation and generation."""
    spike_deviations: float | None = 6.0
    """Skip steps whose loss is this many standard deviations above the mean of the last 128; None: only non-finite ones."""
    max_skipped_steps: int = field(default=10, metadata=FREE)
    """Number of consecutive skipped steps after which the run stops."""
    parallel: str = field(default="ddp", metadata=FREE)
    """Under torchrun: ddp replicates and fsdp shards the model. Add ,tp=N to split layers or ,cp=N to split sequences."""
    seed: int = 0
    """Random seed of the initial weights and of the order of the data."""
    init: Path | None = field(default=None, metadata=FREE)
    """Folder of a run or a Hugging Face model whose weights replace the random initialization."""
    device: str = field(default="auto", metadata=FREE)
    """cuda, cuda:N, cpu, or auto: a GPU if there is one."""
    precision: Precision = "auto"
    """Precision of the matrix products. auto: bfloat16 if supported, else float32; fp8 and variants: FP8 in the blocks."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; updates of bfloat16 weights use stochastic rounding."""
    compile: bool | None = field(default=None, metadata=FREE)
    """Compile the model with torch.compile; by default only on a GPU."""
    cuda_graphs: bool = field(default=False, metadata=FREE)
    """Capture the whole step as one CUDA graph and replay it, which removes launch overhead; for one GPU only."""
    log_every: int = field(default=10, metadata=FREE)
    """Number of steps between rows of metrics."""
    eval_every: int = field(default=250, metadata=FREE)
    """Number of steps between validations; the run always validates after the last step."""
    eval_sequences: int = field(default=1024, metadata=FREE)
    """Number of sequences in a validation, spread evenly over the validation text; always the same sequences."""
    sample_every: int | None = field(default=None, metadata=FREE)
    """Number of steps between sample texts for each of sample_prompts; by default there are none."""
    sample_prompts: tuple[str, ...] = field(default=("Once upon a time",), metadata=FREE)
    """Prompts of the sample texts."""
    sample_tokens: int = field(default=64, metadata=FREE)
    """Maximum number of new tokens in a sample text."""
    checkpoint_every: int = field(default=1000, metadata=FREE)
    """Number of steps between checkpoints; the run always saves one after the last step."""
    keep_checkpoints: int = field(default=2, metadata=FREE)
    """Number of newest checkpoints to keep, besides the best one by validation loss and the one before the wsd decay."""
    tracker: Literal["none", "tensorboard", "wandb"] = field(default="none", metadata=FREE)
    """Experiment tracker that also receives the metrics."""
    history: Annotated[tuple[Change, ...], tyro.conf.Suppress] = field(default=(), metadata=FREE)
    """Changes by extensions, oldest first. The other fields have their current values."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (
            "steps",
            "batch_size",
            "batch_start",
            "log_every",
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
            "sample_every",
            "sample_tokens",
        ):
            value = getattr(self, name)
            _require(name, value, value is None or value == "auto" or value >= 1, "at least 1")
        first, *rest = self.parallel.split(",")
        known = first in ("ddp", "fsdp") and all(re.fullmatch(r"(tp|cp)=[1-9]\d*", part) for part in rest)
        _require("parallel", self.parallel, known, "ddp or fsdp, optionally followed by ,tp=N and ,cp=N")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        for name in ("z_loss", "router_loss"):
            value = getattr(self, name)
            _require(name, value, 0 <= value < math.inf, "a finite number of at least 0")
        _require("ema_decay", self.ema_decay, self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")
        deviations = self.spike_deviations
        _require("spike_deviations", deviations, deviations is None or deviations > 0, "a number above 0")
        self._check_batch_sizes()
        blocks, most = self.activation_checkpointing, self.model.num_layers
        known = 0 <= blocks <= most if type(blocks) is int else blocks in ("none", "block", "auto")
        _require("activation_checkpointing", blocks, known, f"none, block, auto, or a number from 0 to {most}")
        if self.cuda_graphs and self.model.num_experts is not None:
            # In float32 the host reads the number of tokens per expert, which a graph cannot capture.
            allowed = "a precision other than float32 if cuda_graphs is set and the model has experts"
            _require("precision", self.precision, self.precision != "float32", allowed)
        if self.optimizer.name == "schedule_free":
            _require("ema_decay", self.ema_decay, self.ema_decay is None, "None if optimizer.name is schedule_free")
        if self.weights == "bfloat16":
            fits = self.optimizer.name == "adamw" and self.optimizer.states == "float32"
            _require("weights", self.weights, fits, "float32 unless optimizer.name is adamw and optimizer.states is float32")
        in_steps = self.optimizer.warmup_steps < self.steps or self.optimizer.warmup_steps == 0
        _require("optimizer.warmup_steps", self.optimizer.warmup_steps, in_steps, f"less than steps, {self.steps}")

    def _check_batch_sizes(self) -> None:
        start, batch_size, micro = self.batch_start, self.batch_size, self.micro_batch_size
        _require("batch_warmup_steps", self.batch_warmup_steps, self.batch_warmup_steps >= 0, "at least 0")
        if start is not None:
            doubles = batch_size != "auto" and batch_size % start == 0 and (batch_size // start).bit_count() == 1
            _require("batch_start", start, doubles, f"batch_size, {batch_size}, divided by a power of 2")
            _require("cuda_graphs", self.cuda_graphs, not self.cuda_graphs, "False if batch_start is set")
        together = (start is None) == (self.batch_warmup_steps == 0)
        allowed = "0 without batch_start" if start is None else "at least 1 with batch_start"
        _require("batch_warmup_steps", self.batch_warmup_steps, together, allowed)
        if micro is not None and micro != "auto":
            name, smallest = ("batch_size", batch_size) if start is None else ("batch_start", start)
            divides = micro >= 1 and (smallest == "auto" or smallest % micro == 0)
            _require("micro_batch_size", micro, divides, f"a divisor of {name}, {smallest}")

    @property
    def keeps_mean(self) -> bool:
        """Whether the run has averaged weights, which validation, generation and export use."""
        return self.ema_decay is not None or self.optimizer.name == "schedule_free"

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per optimizer step after a batch warm-up. Requires `batch_size` to be a number."""
        assert self.batch_size != "auto"
        return self.batch_size * self.model.context_length

    @property
    def smallest_batch(self) -> int:
        """Number of sequences of the smallest step, which divides that of every step. Requires `batch_size` to be a number."""
        assert self.batch_size != "auto"
        return self.batch_start or self.batch_size

    @functools.cached_property
    def phases(self) -> tuple[tuple[int, "TrainConfig"], ...]:
        """The phases of the run between extensions, oldest first: the number of steps before each, and its configuration."""
        if not self.history:
            return ((0, self),)
        *earlier, change = self.history
        before = {name: values[0] for name, values in change.changes.items()}
        # The current micro-batch size need not divide earlier batch sizes.
        unchanged = dataclasses.replace(self, history=tuple(earlier))
        return (*with_options(unchanged, {"micro_batch_size": None} | before).phases, (change.step, self))

    def at(self, step: int) -> "TrainConfig":
        """Return the configuration in effect at a step, counted from 0."""
        return next(config for first, config in reversed(self.phases) if first <= step)

    def since(self, option: str) -> int:
        """Return the number of steps before the last change of an option, 0 if it never changed."""
        return max((change.step for change in self.history if option in change.changes), default=0)


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}: expected {allowed}")


def holds_run(out: Path) -> bool:
    """Return whether the folder contains a run."""
    return (out / CONFIG_FILE).exists()


def in_json(config: TrainConfig) -> dict[str, Any]:
    """Return the options as nested JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to a dict with option names, such as "optimizer.lr", as keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def _from_json(values: dict[str, Any]) -> TrainConfig:
    import dacite

    try:
        return dacite.from_dict(TrainConfig, values, dacite.Config(type_hooks={Path: Path}, cast=[tuple], strict=True))
    except dacite.DaciteError as error:
        raise ValueError(str(error)) from error


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Return `config` with options such as "optimizer.lr" set to JSON values; raise a `UserError` for invalid ones."""
    values = in_json(config)
    known = flatten(values)
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UserError(f"option {name!r} is unknown" + (f": did you mean {', '.join(near)}?" if near else ""))
        *groups, last = name.split(".")
        functools.reduce(dict.__getitem__, groups, values)[last] = value
    try:
        return _from_json(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot set {', '.join(f'{name} to {value}' for name, value in options.items())}: {error}") from error


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of a configuration from an earlier version."""
    values = {_NEW_NAMES.get(name, name): value for name, value in values.items()}
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        # Earlier versions had one source.
        values["data"] = {**data, "train": [data["train"]]}
    return values


_NEW_NAMES = {"dtype": "precision"}


def load_config(path: Path) -> TrainConfig:
    """Read a configuration written by `save_config`; raise a `UserError` for unknown, missing or mistyped options."""
    require_file(path, "the run's configuration", "expected the folder of a run or a Hugging Face model")
    try:
        return _from_json(_upgraded(json.loads(path.read_text())))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error
