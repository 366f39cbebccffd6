"""The training loop: batches in, metrics and checkpoints out."""

import dataclasses
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import require_file, write_text
from ..kernels import linear_cross_entropy
from ..kernels.device import device_name, gpu_of
from ..model import TransformerLM
from ..model.accounting import model_flops_utilisation, num_parameters
from ..tokenizer import Tokenizer
from .checkpoint import FOLDER_NAME as CHECKPOINTS
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import TrainConfig, check_same_run, load_config, save_config
from .data import TokenDataset, check_fits, open_dataset, training_batch, validation_batches
from .metrics import FILE_NAME as METRICS_FILE
from .metrics import MetricLog, check_tracker
from .optimizer import make_optimizer, set_learning_rate
from .plot import FILE_NAME as PLOT_FILE
from .plot import plot_losses
from .schedule import cosine_with_warmup

CONFIG_FILE, TOKENIZER_FILE, DATA_FILE = "config.json", "tokenizer.json", "data.json"


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reached."""

    run: Path
    steps: int
    num_parameters: int
    train_loss: float
    """Nats per token, mean of the last tenth of the logged steps."""
    valid_loss: float
    """Nats per token, after the last step."""
    tokens_per_second: float
    """Without validation, checkpoints and the first logged steps, which compile."""
    mfu: float | None
    """Share of the device's dense peak, by 3x the forward FLOPs with full attention; None where no peak is known."""
    device: str


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cuda`, `cuda:1` or `cpu` means here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device {name!r} is unknown: choose auto, cuda, cuda:N or cpu")
    device = torch.device(name)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise UserError(f"device {name!r} is not there: torch.cuda finds {num_gpus} GPUs; choose auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, name)


def loss_sum(model: TransformerLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss of a batch in nats; inputs, targets (B, T)."""
    return linear_cross_entropy(model.hidden_states(inputs), model.head_weight, targets, reduction="sum")


class Trainer:
    """A model, its optimizer and its data, able to take a step and to validate itself."""

    def __init__(self, config: TrainConfig, train_data: TokenDataset, valid_data: TokenDataset) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.train_data = train_data
        self.valid_data = valid_data
        # Drawn on the CPU, so that every device begins with the same weights.
        torch.manual_seed(config.seed)
        self.model = TransformerLM(config.model).to(self.device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.step = 0
        compiled = self.device.type == "cuda" if config.compile is None else config.compile
        # The function is compiled, not the module, whose parameters keep their names.
        self._loss_sum: Callable[[TransformerLM, Tensor, Tensor], Tensor] = (
            torch.compile(loss_sum, dynamic=False) if compiled else loss_sum
        )

    def _to_device(self, batch: Tensor) -> Tensor:
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._loss_sum(self.model, self._to_device(inputs), self._to_device(targets))

    def train_step(self) -> dict[str, Tensor | float]:
        """Take one optimizer step; return its loss (nats per token), gradient norm and learning rate, unread."""
        config, optimizer = self.config, self.config.optimizer
        lr = cosine_with_warmup(self.step, optimizer.lr, optimizer.final_lr, optimizer.warmup_steps, config.steps)
        set_learning_rate(self.optimizer, lr)
        batch = training_batch(self.train_data, config.seed, self.step, config.batch_size, config.model.context_length)
        micro = config.micro_batch_size or config.batch_size
        loss = torch.zeros((), device=self.device)
        for inputs, targets in zip(*(part.split(micro) for part in batch), strict=True):
            # Divided by the tokens of the whole step, so that the size of a micro-batch changes nothing.
            micro_loss = self._loss(inputs, targets) / config.tokens_per_step
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr}

    @torch.no_grad()
    def validate(self) -> float:
        """Return the validation loss in nats per token."""
        config = self.config
        micro = config.micro_batch_size or config.batch_size
        total, num_tokens = torch.zeros((), device=self.device), 0
        for inputs, targets in validation_batches(self.valid_data, config.eval_sequences, micro, config.model.context_length):
            total += self._loss(inputs, targets)
            num_tokens += inputs.numel()
        return float(total) / num_tokens


class Clock:
    """Seconds spent training, with pauses left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or restart, once the device has finished its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def restart(self) -> None:
        """Begin a lap here."""
        self._mark = time.perf_counter()


def require_no_run(out: Path) -> None:
    """Raise a `UserError` where `out` is a file, or a folder with anything in it that a run would overwrite."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder with --out")
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} holds a run already: go on with --resume, or name another folder with --out")
    for name in (TOKENIZER_FILE, DATA_FILE, METRICS_FILE, PLOT_FILE, CHECKPOINTS):
        if (out / name).exists():
            raise UserError(f"{out} holds a {name} that a run would overwrite: name another folder with --out")


def _open_run(config: TrainConfig, resume: bool) -> tuple[TokenDataset, TokenDataset]:
    """Check everything that can be wrong before a folder is made or a model is built."""
    run = config.out
    if resume:
        check_same_run(load_config(run / CONFIG_FILE), config)
    else:
        require_no_run(run)
    resolve_device(config.device)
    check_tracker(config.tracker)
    tokenizer = Tokenizer.load(require_file(config.data.tokenizer, "tokenizer", "make one with `tilewright tokenizer train`"))
    train_data, valid_data = (open_dataset(path, tokenizer) for path in (config.data.train, config.data.valid))
    for dataset in (train_data, valid_data):
        check_fits(dataset, config.model.vocab_size, config.model.context_length)
    if resume:
        record = require_file(run / DATA_FILE, "the run's record of its data", "it cannot be resumed without")
        if record.read_bytes() != _data_record(train_data).encode():
            raise UserError(f"{train_data.path} is not the data that the run in {run} began with: see {record}")
    return train_data, valid_data


def _data_record(data: TokenDataset) -> str:
    return json.dumps(dataclasses.asdict(data.header)) + "\n"


def _make_run(trainer: Trainer) -> None:
    config, train_data = trainer.config, trainer.train_data
    config.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config.data.tokenizer, config.out / TOKENIZER_FILE)
    write_text(config.out / DATA_FILE, _data_record(train_data))
    # So that a run can go on from wherever it is interrupted.
    save_checkpoint(config.out, 0, trainer.model, trainer.optimizer, config.keep_checkpoints)
    # Last, because it is what makes the folder a run.
    save_config(config, config.out / CONFIG_FILE)


def _resume(trainer: Trainer) -> None:
    checkpoints = list_checkpoints(trainer.config.out)
    if not checkpoints:
        raise UserError(f"{trainer.config.out} has no checkpoint: remove the folder and start again without --resume")
    trainer.step = load_checkpoint(checkpoints[-1], trainer.model, trainer.optimizer)


def train(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train by `config` into its folder, or go on with the run in it; return what it reached.

    The folder then holds the configuration, the tokenizer, `metrics.jsonl`, `loss.png` and the newest checkpoints. A resumed
    run repeats bit for bit what it would have done, given the same device and versions.
    """
    train_data, valid_data = _open_run(config, resume)
    trainer = Trainer(config, train_data, valid_data)
    if resume:
        _resume(trainer)
    else:
        _make_run(trainer)
    with MetricLog(config.out, config.tracker, dataclasses.asdict(config), trainer.step) as log:
        result = _run(trainer, log)
    plot_losses(config.out)
    return result


def _run(trainer: Trainer, log: MetricLog) -> TrainResult:
    config, device = trainer.config, trainer.device
    gpu = gpu_of(device)
    peak = gpu and gpu.peak_flops("bf16" if trainer.dtype == torch.bfloat16 else "fp32")
    on_terminal = sys.stderr.isatty()
    losses: list[float] = []
    speeds: list[tuple[int, float]] = []  # tokens, seconds of each lap
    valid_loss = math.nan
    lap_start = trainer.step
    clock = Clock(device)
    with tqdm(total=config.steps, initial=trainer.step, desc=f"train {config.out.name}", unit="step", disable=None) as bar:
        if trainer.step == config.steps:
            valid_loss = trainer.validate()
        while trainer.step < config.steps:
            metrics = trainer.train_step()
            bar.update()
            step, last = trainer.step, trainer.step == config.steps
            evaluating, saving = step % config.eval_every == 0 or last, step % config.checkpoint_every == 0 or last
            if not (step % config.log_every == 0 or evaluating or saving):
                continue
            row = {name: float(value) for name, value in metrics.items()}
            _require_finite(row, config)
            tokens, seconds = (step - lap_start) * config.tokens_per_step, clock.lap()
            lap_start = step
            speeds.append((tokens, seconds))
            losses.append(row["loss"])
            row["tokens_per_second"] = tokens / seconds
            mfu = model_flops_utilisation(config.model, row["tokens_per_second"], peak)
            if evaluating:
                row["valid_loss"] = valid_loss = trainer.validate()
                # A step's loss is from before its update; this one is from after.
                _require_finite(row, config)
            log.log(step, **row, mfu=mfu)
            bar.set_postfix(loss=f"{row['loss']:.3f}", tokens_per_s=f"{row['tokens_per_second']:,.0f}")
            if evaluating or not on_terminal:
                tqdm.write(_line(step, config.steps, row, mfu), file=sys.stderr)
            if saving:
                save_checkpoint(config.out, step, trainer.model, trainer.optimizer, config.keep_checkpoints)
            clock.restart()
    # The first lap compiles and warms caches; it counts only where there is no other.
    tokens, seconds = (sum(column) for column in zip(*(speeds[1:] or speeds or [(0, 1.0)]), strict=True))
    tail = losses[-max(1, len(losses) // 10) :]
    return TrainResult(
        run=config.out,
        steps=trainer.step,
        num_parameters=num_parameters(config.model),
        train_loss=sum(tail) / len(tail) if tail else math.nan,
        valid_loss=valid_loss,
        tokens_per_second=tokens / seconds,
        mfu=model_flops_utilisation(config.model, tokens / seconds, peak),
        device=device_name(device),
    )


def _require_finite(row: dict[str, float], config: TrainConfig) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value}: start a new run with a lower --optimizer.lr, below {config.optimizer.lr:g}, or a longer "
                f"--optimizer.warmup-steps; the checkpoints in {config.out} are from before"
            )


def _line(step: int, steps: int, row: dict[str, float], mfu: float | None) -> str:
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {row['loss']:.4f}"]
    if "valid_loss" in row:
        parts.append(f"valid {row['valid_loss']:.4f}")
    parts += [f"grad norm {row['grad_norm']:.3f}", f"lr {row['lr']:.2e}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    return "  ".join(parts)
