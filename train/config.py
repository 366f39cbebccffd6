"""Every option of a training run: the single source of the command line, of a run's `config.json` and of its checks."""

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

import dacite
import tyro

from ..errors import UserError
from ..fields import check_fields
from ..files import require_file, write_text
from ..model.config import ModelConfig

Precision = Literal["auto", "float32", "bfloat16", "fp8", "fp8_rowwise", "fp8_delayed"]

# Whether a field may change when a run goes on; one that says nothing may not.
FREE = {"on_resume": "free"}
"""It may: it changes what is printed, kept and how fast, not what is learnt."""
GROWS = {"on_resume": "grows"}
"""By an extension only."""
RESTARTS = {"on_resume": "restarts"}
"""By an extension that states a learning rate only, as it shapes the schedule."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from. A text file is encoded once, to a token file (.tokens) beside it."""

    train: tuple[Path, ...] = field(metadata=FREE)
    """Training texts, chats (JSON lines with messages), token files (.tokens) or folders of their shards; each is a source."""
    valid: Path = field(metadata=FREE)
    """Validation text or chats, or a token file (.tokens)."""
    tokenizer: Path = field(metadata=FREE)
    """The tokenizer's file."""
    names: tuple[str, ...] | None = field(default=None, metadata=FREE)
    """Name of each source, under which its own losses are logged."""
    source_valid: tuple[Path, ...] | None = field(default=None, metadata=FREE)
    """Validation text of each source, in their order, whose losses are logged beside that of `valid`."""
    weights: tuple[float, ...] | None = field(default=None, metadata=GROWS)
    """Share of the sequences that come from each training file, in their order; by default in proportion to its length."""
    documents: bool = False
    """Whether attention stays inside each document, as end-of-text tokens bound them; in chats it always stays inside each
    conversation."""
    packing: Literal["none", "best_fit"] = "none"
    """best_fit: windows of whole documents, each in the window that it fills best, so that none is cut that fits in one."""
    chat_template: Path | None = field(default=None, metadata=FREE)
    """File of the chat template; by default that of the tokenizer's folder."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        _require("data.train", self.train, len(self.train) >= 1, "at least one file")
        weights = self.weights
        if weights is not None:
            fits = len(weights) == len(self.train) and all(0 < weight < math.inf for weight in weights)
            _require(
                "data.weights", weights, fits, f"one finite number above 0 for each of the {len(self.train)} training files"
            )
        names, valid, count = self.source_names, self.source_valid, len(self.train)
        if names is not None:
            fits = len(names) == len(set(names)) == count and all(name and "/" not in name for name in names)
            _require("data.names", names, fits, f"a name without / for each of the {count} training files, all different")
        paths = None if valid is None else ", ".join(map(str, valid))
        _require("data.source_valid", paths, valid is None or len(valid) == count, f"one file for each of the {count} sources")

    @property
    def source_names(self) -> tuple[str, ...] | None:
        """The name of each source, by default of its file; None where no loss of a single source is asked for."""
        if self.names is not None or self.source_valid is None:
            return self.names
        return tuple(path.stem for path in self.train)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024) under a warm-up and a decay."""

    name: Literal["adamw", "muon", "schedule_free"] = "adamw"
    """muon: the matrices of the blocks by Muon, with updates as large as AdamW's; all else by AdamW. schedule_free: AdamW whose
    weights are a mean over the steps, in place of a decay (Defazio et al. 2024)."""
    states: Literal["float32", "8bit"] = "float32"
    """How AdamW's moments are held."""
    lr: float = field(default=1e-3, metadata=RESTARTS)
    """Peak learning rate."""
    final_lr: float = field(default=1e-4, metadata=RESTARTS)
    """Learning rate of the last step."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = field(default="cosine", metadata=RESTARTS)
    """How the learning rate falls from its peak: half a cosine; constant, then a line over decay_share; a line all the way; not
    at all."""
    decay_share: float = field(default=0.2, metadata=RESTARTS)
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
        check_fields(self, "optimizer.")
        _require("optimizer.lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        _require("optimizer.final_lr", self.final_lr, 0 <= self.final_lr <= self.lr, f"between 0 and lr, {self.lr}")
        _require("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        _require("optimizer.decay_share", self.decay_share, 0 < self.decay_share <= 1, "above 0, at most 1")
        _require("optimizer.betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "in [0, 1) each")
        fits = self.states == "float32" or self.name == "adamw"
        _require("optimizer.states", self.states, fits, "float32 unless name is adamw")
        if self.name == "schedule_free":
            # Its mean of the weights stands in place of a decay.
            constant = self.schedule == "constant"
            _require("optimizer.schedule", self.schedule, constant, "constant where optimizer.name is schedule_free")
            _require("optimizer.betas", self.betas, self.betas[0] > 0, "above 0 where name is schedule_free")
        _require("optimizer.eps", self.eps, 0 < self.eps < math.inf, "a finite number above 0")
        finite = 0 <= self.weight_decay < math.inf
        _require("optimizer.weight_decay", self.weight_decay, finite, "0 or a finite number above it")
        _require("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "above 0")


@dataclass(frozen=True)
class Change:
    """What an extension has changed of a run."""

    step: int
    """Steps taken before."""
    changes: dict[str, Any]
    """By option, such as "batch_size": the value before and the value since, as JSON holds them. "optimizer.lr" is there where
    the schedule began anew, "data.train" where the data did."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {_short(before)} \u2192 {_short(after)}" for name, (before, after) in self.changes.items())


def _short(value: Any) -> str:
    # Of files, their names.
    return " ".join(Path(str(item)).name for item in value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    out: Path = field(metadata=FREE)
    """Folder of the run; made anew."""
    model: ModelConfig
    data: DataConfig
    steps: int = field(metadata=GROWS)
    """Optimizer steps."""
    batch_size: int | Literal["auto"] = field(metadata=GROWS)
    """Sequences of model.context_length tokens a step; auto takes as many as fit in the GPU's memory by the accounting."""
    batch_start: int | None = field(default=None, metadata=GROWS)
    """Sequences of the first steps, doubled until they are batch_size (Merrill et al. 2025); by default they are so at once."""
    batch_warmup_steps: int = field(default=0, metadata=GROWS)
    """Steps until they are, divided equally among the sizes below batch_size."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_size: int | Literal["auto"] | None = field(default=None, metadata=FREE)
    """Sequences a forward pass of one GPU; fewer than its share of the batch accumulates gradients. By default the whole share;
    auto takes the largest divisor that fits in the GPU's memory by the accounting."""
    activation_checkpointing: Literal["none", "block", "auto"] | int = field(default="none", metadata=FREE)
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
    max_skipped_steps: int = field(default=10, metadata=FREE)
    """Skipped steps in a row after which the run stops."""
    parallel: str = field(default="ddp", metadata=FREE)
    """Under torchrun. ddp: every GPU holds the model; fsdp: each holds a shard of it. Behind a comma, how many GPUs share each
    layer's heads and widths (tp=2), or each sequence (cp=2)."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    init: Path | None = field(default=None, metadata=FREE)
    """Begin with the weights of another run, or of a folder of Hugging Face's, in place of random ones."""
    device: str = field(default="auto", metadata=FREE)
    """cuda, cpu, or auto: a GPU if there is one."""
    precision: Precision = "auto"
    """Of the matrix products; auto takes bfloat16 on GPUs that have it. fp8: those of the blocks in 8 bits, with a scale for
    each tensor, each row (fp8_rowwise), or each tensor by what it was before (fp8_delayed); all else in bfloat16."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How weights are held; updates of bfloat16 ones are rounded stochastically."""
    compile: bool | None = field(default=None, metadata=FREE)
    """Whether to torch.compile the model; by default on a GPU only."""
    cuda_graphs: bool = field(default=False, metadata=FREE)
    """Whether the whole step is recorded once and replayed as one CUDA graph, which removes what launches cost; for one GPU."""
    log_every: int = field(default=10, metadata=FREE)
    """Steps between two lines of metrics."""
    eval_every: int = field(default=250, metadata=FREE)
    """Steps between two validations; the last step is always validated."""
    eval_sequences: int = field(default=1024, metadata=FREE)
    """Sequences a validation, spread evenly over the validation text; the same ones every time."""
    sample_every: int | None = field(default=None, metadata=FREE)
    """Steps between two texts that the model writes for each prompt; by default it writes none."""
    sample_prompts: tuple[str, ...] = field(default=("Once upon a time",), metadata=FREE)
    """What those texts begin with."""
    sample_tokens: int = field(default=64, metadata=FREE)
    """Most tokens of each."""
    checkpoint_every: int = field(default=1000, metadata=FREE)
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = field(default=2, metadata=FREE)
    """Newest checkpoints that stay on disk, beside the one with the lowest validation loss, and that from which wsd falls."""
    tracker: Literal["none", "tensorboard", "wandb"] = field(default="none", metadata=FREE)
    """Where metrics go besides the console and metrics.jsonl."""
    history: Annotated[tuple[Change, ...], tyro.conf.Suppress] = field(default=(), metadata=FREE)
    """What extensions have changed, oldest first; all other fields hold what is so now."""

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
        _require("parallel", self.parallel, known, "ddp or fsdp, alone or with tp=N or cp=N behind commas")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        for name in ("z_loss", "router_loss"):
            value = getattr(self, name)
            _require(name, value, 0 <= value < math.inf, "0 or a finite number above it")
        _require("ema_decay", self.ema_decay, self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1")
        deviations = self.spike_deviations
        _require("spike_deviations", deviations, deviations is None or deviations > 0, "above 0")
        self._check_batch_sizes()
        blocks, most = self.activation_checkpointing, self.model.num_layers
        known = 0 <= blocks <= most if type(blocks) is int else blocks in ("none", "block", "auto")
        _require("activation_checkpointing", blocks, known, f"none, block, auto, or a number of blocks, at most {most}")
        if self.cuda_graphs and self.model.num_experts is not None:
            # In float32 the host waits to know how many tokens each expert has.
            _require(
                "precision", self.precision, self.precision != "float32", "bfloat16 where cuda_graphs is set, with experts"
            )
        if self.optimizer.name == "schedule_free":
            _require("ema_decay", self.ema_decay, self.ema_decay is None, "left out where optimizer.name is schedule_free")
        if self.weights == "bfloat16":
            fits = self.optimizer.name == "adamw" and self.optimizer.states == "float32"
            _require("weights", self.weights, fits, "float32, unless optimizer.name is adamw and optimizer.states float32")
        in_steps = self.optimizer.warmup_steps < self.steps or self.optimizer.warmup_steps == 0
        _require("optimizer.warmup_steps", self.optimizer.warmup_steps, in_steps, f"below steps, {self.steps}")

    def _check_batch_sizes(self) -> None:
        start, batch_size, micro = self.batch_start, self.batch_size, self.micro_batch_size
        _require("batch_warmup_steps", self.batch_warmup_steps, self.batch_warmup_steps >= 0, "0 or more")
        if start is not None:
            doubles = batch_size != "auto" and batch_size % start == 0 and (batch_size // start).bit_count() == 1
            _require("batch_start", start, doubles, f"batch_size, {batch_size}, halved once or more often")
            _require("cuda_graphs", self.cuda_graphs, not self.cuda_graphs, "false where batch_start is set")
        together = (start is None) == (self.batch_warmup_steps == 0)
        _require("batch_warmup_steps", self.batch_warmup_steps, together, "above 0 where batch_start is set, and only there")
        if micro is not None and micro != "auto":
            name, smallest = ("batch_size", batch_size) if start is None else ("batch_start", start)
            divides = micro >= 1 and (smallest == "auto" or smallest % micro == 0)
            _require("micro_batch_size", micro, divides, f"a divisor of {name}, {smallest}")

    @property
    def keeps_mean(self) -> bool:
        """Whether the run validates and is exported with a mean of its weights."""
        return self.ema_decay is not None or self.optimizer.name == "schedule_free"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, where batch_size is a number; those of a warm-up see fewer."""
        assert self.batch_size != "auto"
        return self.batch_size * self.model.context_length

    @property
    def smallest_batch(self) -> int:
        """Sequences of the smallest step, where batch_size is a number; every step's number is a multiple of it."""
        assert self.batch_size != "auto"
        return self.batch_start or self.batch_size

    @functools.cached_property
    def phases(self) -> tuple[tuple[int, "TrainConfig"], ...]:
        """The parts of the run between its extensions, oldest first: the steps taken before each, and its settings."""
        if not self.history:
            return ((0, self),)
        *earlier, change = self.history
        before = {name: values[0] for name, values in change.changes.items()}
        # A micro-batch of today need not divide the batches of then.
        unchanged = dataclasses.replace(self, history=tuple(earlier))
        return (*with_options(unchanged, {"micro_batch_size": None} | before).phases, (change.step, self))

    def at(self, step: int) -> "TrainConfig":
        """Return the settings of a step, counted from 0."""
        return next(config for first, config in reversed(self.phases) if first <= step)

    def since(self, option: str) -> int:
        """Return the steps taken before the last change of an option, 0 where it never changed."""
        return max((change.step for change in self.history if option in change.changes), default=0)


def _require(name: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}: it must be {allowed}")


def in_json(config: TrainConfig) -> dict[str, Any]:
    """Return the options as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by the names of their options, such as "optimizer.lr"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def _from_json(values: dict[str, Any]) -> TrainConfig:
    return dacite.from_dict(TrainConfig, values, dacite.Config(type_hooks={Path: Path}, cast=[tuple], strict=True))


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Return `config` with options such as "optimizer.lr" set to values of JSON; what does not fit is a `UserError`."""
    values = in_json(config)
    known = flatten(values)
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


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration of an earlier version as today's has them."""
    values = {_NEW_NAMES.get(name, name): value for name, value in values.items()}
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("train"), str):
        # There was one source.
        values["data"] = {**data, "train": [data["train"]]}
    return values


_NEW_NAMES = {"dtype": "precision"}


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote; anything unknown, missing or of a wrong type is a `UserError`."""
    require_file(path, "the run's configuration", "is the folder that of a run?")
    try:
        return _from_json(_upgraded(json.loads(path.read_text())))
    except (ValueError, dacite.DaciteError, AttributeError) as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error
