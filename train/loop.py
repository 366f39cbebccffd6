"""The training loop: batches in, metrics and checkpoints out."""

import contextlib
import dataclasses
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ..errors import DivergedError, UserError
from ..files import require_file
from ..kernels.device import device_name, gpu_of
from ..model.accounting import Policy, hardware_flops, model_flops_utilisation, num_parameters, operations
from ..tokenizer import END_OF_TEXT, read_tokenizer
from .batch_size import device_memory, fit_memory
from .bits_per_byte import bits_per_byte, bytes_per_token, token_sizes
from .capture import StepCapture
from .checkpoint.layout import read_state
from .checkpoint.writer import CheckpointWriter
from .config import TrainConfig, check_same_run, load_config
from .data.datasets import check_fits, open_data, validation_batches
from .data.sampling import TrainingData, check_record
from .device import collected_by_hand
from .diagnosis import diagnose, summary, write_diagnosis
from .distributed import AgreedStop, World, check_parallel, says_why_it_ends
from .export import initialise
from .folder import (
    CONFIG_FILE,
    Resume,
    begin_run,
    checkpoint_to_resume,
    holds_run,
    make_folder,
    mark_beginning,
    read_data_record,
    require_no_run,
)
from .metrics import MetricLog, check_tracker
from .parallel import open_writer
from .plot import plot_losses
from .signals import StopRequest
from .trainer import Trainer

T = TypeVar("T")


@dataclass(frozen=True)
class TrainResult:
    """What a run reached."""

    run: Path
    steps: int
    num_parameters: int
    train_loss: float
    """Nats per token, mean of the last tenth of the logged steps."""
    valid_loss: float
    """Nats per token, after the last step; NaN where a signal stopped the run before."""
    tokens_per_second: float
    """Without validation, checkpoints and the first logged steps, which compile."""
    mfu: float | None
    """Share of the device's dense peak, by 3x the forward FLOPs with full attention; None where no peak is known."""
    device: str
    first_step_seconds: float = math.nan
    """From the call to the end of the first step: the data, the model, the compilation; NaN where no step was taken."""
    skipped_steps: int = 0
    """Steps whose loss was not finite or a spike."""
    stopped_by: str | None = None
    """The signal that stopped the run before its last step."""
    valid_bits_per_byte: float = math.nan
    """The validation loss in bits per byte of the text that it is of, which compares across tokenizers; NaN as that is."""


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


def train(config: TrainConfig, *, resume: Resume | None = None, profile: bool = False) -> TrainResult:
    """Train by `config` into its folder, or go on with the run in it; return what it reached.

    `resume` is the path of one of the run's checkpoints, or "auto": the newest valid one, or a new run where the folder holds
    none. The folder then holds the configuration, the tokenizer, `metrics.jsonl`, `loss.png` and checkpoints. A resumed run
    repeats bit for bit what it would have done, given the same device and versions. SIGTERM, SIGINT and SIGUSR1 end it after
    its step with a checkpoint. `profile` records a few steps. Under torchrun all its processes train the one run.
    """
    start = time.perf_counter()
    with World.join(config.device) as world:
        if resume == "auto" and not world.on_first(lambda: holds_run(config.out)):
            if world.is_first:
                print(f"{config.out} holds no run to go on with: a new one begins", file=sys.stderr)
            resume = None
        return _train(config, resume, profile, world, start)


def _train(config: TrainConfig, resume: Resume | None, profile: bool, world: World, start: float) -> TrainResult:
    config, trainer, valid_bytes_per_token = _open(config, resume, world)
    # The signals last: until all is closed, they are remembered.
    with StopRequest() as stop, says_why_it_ends(), contextlib.closing(trainer):
        if not resume:
            world.on_first(lambda: mark_beginning(config.out))
        with open_writer(config, world) as writer:
            unfinished = _resume(trainer, resume) if resume else _begin(trainer, writer)
            capture = StepCapture(config.out, trainer.device) if profile and world.is_first else None
            # The row of an unfinished step comes again, even where it was finished once before.
            first_row = trainer.step - bool(unfinished)
            with (
                MetricLog(config.out, config.tracker, dataclasses.asdict(config), first_row)
                if world.is_first
                else contextlib.nullcontext() as log,
                collected_by_hand(),
                contextlib.closing(capture) if capture else contextlib.nullcontext(),
            ):
                loop = _Loop(trainer, writer, log, world.agreed(stop), capture, start, valid_bytes_per_token)
                result = loop.run(unfinished)
            if world.is_first:
                plot_losses(config.out)
            return result


def _open(config: TrainConfig, resume: Resume | None, world: World) -> tuple[TrainConfig, Trainer, float]:
    """Check everything that can be wrong before a folder is made, then build the model.

    The number is the bytes of text that a token of the validation stands for.
    """
    run = config.out
    if resume:
        stored = load_config(run / CONFIG_FILE)
        if config.batch_size == "auto":
            config = dataclasses.replace(config, batch_size=stored.batch_size)
        check_same_run(stored, config)
    else:
        world.on_first(lambda: require_no_run(run))
    check_parallel(config, world)
    config = fit_memory(config, world.on_first(lambda: device_memory(world.device)), world.size)
    check_tracker(config.tracker)
    tokenizer = read_tokenizer(require_file(config.data.tokenizer, "tokenizer", "make one with `tilewright tokenizer train`"))
    if config.data.documents and tokenizer.end_of_text_id is None:
        raise UserError(f"data.documents is set, but {config.data.tokenizer} has no {END_OF_TEXT} that bounds documents")
    datasets, valid_data = world.first_before_others(lambda: open_data(config.data, tokenizer))
    for dataset in (*datasets, valid_data):
        check_fits(dataset, config.model.vocab_size, config.model.context_length)
    train_data = TrainingData(datasets, config.model.context_length, config.seed, config.data.weights)
    if train_data.chats and world.is_first:
        epochs = config.steps * config.tokens_per_step / config.model.context_length / sum(train_data.num_windows)
        summaries = [windows.summary() for windows in train_data.chats]
        print("\n".join([*summaries, f"{config.steps:,} steps read {epochs:.1f} times as many windows"]), file=sys.stderr)
    if resume:
        check_record(read_data_record(run), train_data)
        # So few that reading them all is nothing.
        valid_data.verify()
    first = None if resume or config.init is None else functools.partial(initialise, folder=config.init, tokenizer=tokenizer)
    trainer = Trainer(config, train_data, valid_data, tokenizer.end_of_text_id, first, world, resumes=bool(resume))
    batches = validation_batches(valid_data, config.eval_sequences, 1, config.model.context_length)
    return config, trainer, bytes_per_token(batches, token_sizes(tokenizer))


def _begin(trainer: Trainer, writer: CheckpointWriter) -> None:
    on_first = trainer.world.on_first
    on_first(lambda: make_folder(trainer.config, trainer.train_data.record()))
    # So that a run can go on from wherever it is interrupted.
    writer.save(0, trainer.tensors(), {"unfinished_row": None})
    writer.wait()
    on_first(lambda: begin_run(trainer.config))


def _resume(trainer: Trainer, resume: Resume) -> dict[str, Any] | None:
    """Load the checkpoint; return the row of its step if the run was stopped while it was being validated."""
    folder = trainer.world.on_first(lambda: checkpoint_to_resume(trainer.config.out, resume))
    trainer.load(folder)
    return read_state(folder)["unfinished_row"]


class _Loop:
    """The steps of a run between two processes' ends."""

    def __init__(
        self,
        trainer: Trainer,
        writer: CheckpointWriter,
        log: MetricLog | None,
        stop: StopRequest | AgreedStop,
        capture: StepCapture | None,
        start: float,
        valid_bytes_per_token: float,
    ) -> None:
        self.trainer, self.writer, self.log, self.stop, self.capture = trainer, writer, log, stop, capture
        self.config, self.device = trainer.config, trainer.device
        self._start, self._first_step_seconds = start, math.nan
        gpu = gpu_of(self.device)
        peak = gpu and gpu.peak_flops("bf16" if trainer.dtype == torch.bfloat16 else "fp32")
        self._peak = peak and peak * trainer.world.size
        self._hardware_flops_per_token = self._count_hardware_flops()
        self._losses: list[float] = []
        self._laps: list[tuple[int, float]] = []  # tokens, seconds
        self._valid_loss, self._valid_bytes_per_token = math.nan, valid_bytes_per_token
        self._unfinished_row: dict[str, Any] | None = None
        self._saved_step = trainer.step
        self._lap_step, self._lap_waited = trainer.step, 0.0
        self._clock = Clock(self.device)

    def _count_hardware_flops(self) -> float:
        policy = Policy(checkpointing=self.trainer.model.activation_checkpointing, vocabulary="padded")
        return hardware_flops(operations(self.config.model, 1, None, policy)) / self.config.model.context_length

    def run(self, unfinished_row: dict[str, Any] | None) -> TrainResult:
        """Take the steps that are left, or those until a signal; `unfinished_row` is still to be validated and logged."""
        trainer, config = self.trainer, self.config
        if self._peak is not None and trainer.world.is_first:
            print(
                f"MFU: the model's FLOPs, attention in full, backward twice the forward pass, of {self._peak / 1e12:,.0f} "
                "TFLOP/s; HFU: with what is computed again",
                file=sys.stderr,
            )
        silent = None if trainer.world.is_first else True
        with tqdm(
            total=config.steps, initial=trainer.step, desc=f"train {config.out.name}", unit="step", disable=silent
        ) as bar:
            if unfinished_row is not None:
                self._finish(unfinished_row, bar)
            elif trainer.step == config.steps:
                self._valid_loss = self._validate() or math.nan
            self._clock.restart()
            while trainer.step < config.steps and not self.stop:
                compiles = math.isnan(self._first_step_seconds)
                metrics = self._unless_stopped(trainer.train_step) if compiles else trainer.train_step()
                if metrics is None:
                    break
                bar.update()
                if self.capture is not None:
                    self.capture.after_step()
                self._after_step(metrics, bar)
        if trainer.step != self._saved_step:
            self._require_good_steps()
            self._save()
        # Whatever is still being written has to be whole before the run says that it is.
        self.writer.wait()
        return self._result()

    def _after_step(self, metrics: Mapping[str, Any], bar: tqdm) -> None:
        trainer, config, step = self.trainer, self.config, self.trainer.step
        if math.isnan(self._first_step_seconds):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._first_step_seconds = time.perf_counter() - self._start
            if trainer.world.is_first:
                tqdm.write(f"first step after {self._first_step_seconds:.1f} s", file=sys.stderr)
            gc.collect()
            gc.freeze()
        last = step == config.steps
        evaluating, saving = step % config.eval_every == 0 or last, step % config.checkpoint_every == 0 or last
        if not (step % config.log_every == 0 or evaluating or saving):
            return
        row = self._row(metrics)
        self._require_good_steps()
        if evaluating:
            self._finish(row, bar)
        else:
            self._log(row, bar)
        if saving:
            self._save()
        if self.capture is not None and (evaluating or saving):
            self.capture.after_pause()
        gc.collect()
        self._clock.restart()

    def _row(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Read a step's metrics and add what the lap since the last row took."""
        trainer, config = self.trainer, self.config
        row = {name: _finite(float(value)) for name, value in metrics.items()}
        tokens, seconds = (trainer.step - self._lap_step) * config.tokens_per_step, self._clock.lap()
        waited = trainer.batches.waited
        row["tokens_per_second"] = tokens / seconds
        row["mfu"] = model_flops_utilisation(config.model, tokens / seconds, self._peak)
        row["hfu"] = None if self._peak is None else self._hardware_flops_per_token * tokens / seconds / self._peak
        row["data_wait"] = (waited - self._lap_waited) / seconds
        row["skipped_steps"] = int(trainer.guard.skipped)
        if self.device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self._lap_step, self._lap_waited = trainer.step, waited
        self._laps.append((tokens, seconds))
        if row["loss"] is not None:
            self._losses.append(row["loss"])
        return row

    def _unless_stopped(self, compiling: Callable[[], T]) -> T | None:
        """Return what `compiling` gives; None where it fails after a signal, which whoever sends it sends to the compiler too.

        That is before anything has changed. Of several processes the others would wait for this one: there, the error stays.
        """
        try:
            return compiling()
        except Exception:
            if self.trainer.world.size == 1 and self.stop:
                return None
            raise

    def _validate(self) -> float | None:
        return self._unless_stopped(lambda: self.trainer.validate(lambda: bool(self.stop)))

    def _finish(self, row: dict[str, Any], bar: tqdm) -> None:
        """Validate, and log the row with it; where a signal comes between, the row stays unfinished."""
        valid_loss = self._validate()
        if valid_loss is None:
            self._unfinished_row, self._valid_loss = row, math.nan
            return
        if not math.isfinite(valid_loss):
            # A step's loss is from before its update; this one is from after.
            raise self._diverged(f"valid_loss is {valid_loss}")
        row["valid_loss"] = self._valid_loss = valid_loss
        row["valid_bits_per_byte"] = _finite(self._bits_per_byte(valid_loss))
        self._log(row, bar)

    def _bits_per_byte(self, valid_loss: float) -> float:
        return bits_per_byte(valid_loss, self._valid_bytes_per_token)

    def _log(self, row: dict[str, Any], bar: tqdm) -> None:
        if self.log is None:
            return
        step = self.trainer.step
        self.log.log(step, **row)
        bar.set_postfix(loss=_number(row["loss"], ".3f"), tokens_per_s=f"{row['tokens_per_second']:,.0f}")
        if "valid_loss" in row or not sys.stderr.isatty():
            tqdm.write(_line(step, self.config.steps, row), file=sys.stderr)

    def _save(self) -> None:
        step, config = self.trainer.step, self.config
        validated = (step % config.eval_every == 0 or step == config.steps) and self._unfinished_row is None
        state = {"unfinished_row": self._unfinished_row}
        self.writer.save(step, self.trainer.tensors(), state, self._valid_loss if validated else None)
        self._saved_step = step

    def _require_good_steps(self) -> None:
        guard = self.trainer.guard
        if int(guard.most_in_a_row) < self.config.max_skipped_steps:
            # What was within the limit stays so, even where the run goes on with a lower one.
            guard.most_in_a_row.copy_(guard.in_a_row)
            return
        diagnosis = diagnose(self.trainer)
        path = self.trainer.world.on_first(lambda: write_diagnosis(self.config.out, diagnosis))
        raise self._diverged(
            f"{diagnosis['guard']['most_in_a_row']} steps in a row had a loss that is not finite or a spike: "
            f"{summary(diagnosis)}; see {path}"
        )

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what}: start a new run with a lower --optimizer.lr, below {self.config.optimizer.lr:g}, or a longer "
            f"--optimizer.warmup-steps; the checkpoints in {self.config.out} are from before"
        )

    def _result(self) -> TrainResult:
        trainer, config = self.trainer, self.config
        # The first lap compiles and warms caches; it counts only where there is no other.
        tokens, seconds = (sum(column) for column in zip(*(self._laps[1:] or self._laps or [(0, 1.0)]), strict=True))
        tail = self._losses[-max(1, len(self._losses) // 10) :]
        stopped = trainer.step < config.steps or math.isnan(self._valid_loss)
        return TrainResult(
            run=config.out,
            steps=trainer.step,
            num_parameters=num_parameters(config.model),
            train_loss=sum(tail) / len(tail) if tail else math.nan,
            valid_loss=math.nan if stopped else self._valid_loss,
            tokens_per_second=tokens / seconds,
            mfu=model_flops_utilisation(config.model, tokens / seconds, self._peak),
            device=device_name(self.device),
            first_step_seconds=self._first_step_seconds,
            skipped_steps=int(trainer.guard.skipped),
            stopped_by=self.stop.signal.name if self.stop.signal and stopped else None,
            valid_bits_per_byte=math.nan if stopped else self._bits_per_byte(self._valid_loss),
        )


def _finite(value: float) -> float | None:
    # JSON knows no NaN.
    return value if math.isfinite(value) else None


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _line(step: int, steps: int, row: dict[str, Any]) -> str:
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {_number(row['loss'], '.4f')}"]
    if "valid_loss" in row:
        parts.append(f"valid {row['valid_loss']:.4f} ({_number(row['valid_bits_per_byte'], '.4f')} bits/byte)")
    parts += [f"grad norm {_number(row['grad_norm'], '.3f')}", f"lr {row['lr']:.2e}"]
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}  HFU {row['hfu']:.1%}")
    if "peak_memory_bytes" in row:
        parts.append(f"peak {row['peak_memory_bytes'] / 1e9:.1f} GB")
    if row["data_wait"] >= 0.005:
        parts.append(f"waited for data {row['data_wait']:.1%}")
    if row["skipped_steps"]:
        parts.append(f"skipped {row['skipped_steps']}")
    return "  ".join(parts)
