"""One training run, from its configuration to what it reached."""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..kernels.device import device_name
from ..model.accounting import num_parameters
from ..tokenizer import AnyTokenizer
from .callbacks.bits_per_byte import BitsPerByte
from .callbacks.callback import Callback
from .callbacks.checkpoints import Checkpoints
from .callbacks.garbage import GarbageCollection
from .callbacks.good_steps import GoodSteps
from .callbacks.log import Log
from .callbacks.profiler import Profiler
from .callbacks.samples import Samples
from .callbacks.source_validation import SourceValidation
from .callbacks.speed import Speed
from .callbacks.validation import Validation
from .callbacks.verified_data import VerifiedData
from .checkpoint.writer import CheckpointWriter
from .config import TrainConfig
from .data.record import validation_notes
from .distributed import AgreedStop, Layout, World, join, says_why_it_ends
from .extension import Extend
from .folder import Resume, holds_run, mark_beginning, read_data_record
from .loop import Loop
from .metrics import MetricLog
from .opening import begin, open_run, resume_run
from .parallel import open_writer
from .plot import plot_losses
from .signals import StopRequest
from .trainer import Trainer


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
    train_bits_per_byte: float = math.nan
    """The training loss in bits per byte of the steps' own text."""


def train(
    config: TrainConfig,
    *,
    resume: Resume | None = None,
    extend: Extend | None = None,
    accept_valid: bool = False,
    profile: bool = False,
) -> TrainResult:
    """Train by `config` into its folder, or go on with the run in it; return what it reached.

    `resume` is the path of one of the run's checkpoints, or "auto": the newest valid one, or a new run where the folder holds
    none. The folder then holds the configuration, the tokenizer, `metrics.jsonl`, `loss.png` and checkpoints. A resumed run
    repeats bit for bit what it would have done, given the same device and versions. It takes more steps than it began with
    where its schedule allows that; what else may change from the checkpoint on, `extend` says (see `extension.Extend`).
    `accept_valid` lets it go on with other validation data. SIGTERM, SIGINT and SIGUSR1 end it after its step with a
    checkpoint. `profile` records a few steps. Under torchrun all its processes train the one run.
    """
    start = time.perf_counter()
    with join(config.device, Layout.parse(config.parallel)) as world:
        if resume == "auto" and not world.on_first(lambda: holds_run(config.out)):
            if world.is_first:
                print(f"{config.out} holds no run to go on with: a new one begins", file=sys.stderr)
            resume = None
        return _train(config, resume, extend, accept_valid, profile, world, start)


def _train(
    config: TrainConfig,
    resume: Resume | None,
    extend: Extend | None,
    accept_valid: bool,
    profile: bool,
    world: World,
    start: float,
) -> TrainResult:
    trainer, tokenizer, resume = open_run(config, resume, extend, accept_valid, world)
    config = trainer.config
    # The signals last: until all is closed, they are remembered.
    with StopRequest() as stop, says_why_it_ends(), contextlib.closing(trainer):
        if not resume:
            world.on_first(lambda: mark_beginning(config.out))
        with open_writer(config, world) as writer:
            unfinished_row = resume_run(trainer, tokenizer, resume) if resume else begin(trainer, tokenizer, writer)
            # The row of an unfinished step comes again, even where it was finished once before.
            first_row = trainer.step - bool(unfinished_row)
            with contextlib.ExitStack() as stack:
                metrics = None
                if world.is_first:
                    values = dataclasses.asdict(config)
                    metrics = stack.enter_context(MetricLog(config.out, config.tracker, values, first_row))
                    for step, note in validation_notes(read_data_record(config.out)):
                        metrics.note(step, note)
                features = _Features(trainer, tokenizer, writer, metrics, first_row, world.agreed(stop), profile, start)
                for callback in features.callbacks:
                    stack.callback(callback.close)
                Loop(trainer, features.callbacks, features.stop).run(unfinished_row)
                result = features.result()
            if world.is_first:
                plot_losses(config.out, config.history)
            return result


class _Features:
    """All that a run does beside its steps."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: AnyTokenizer,
        writer: CheckpointWriter,
        metrics: MetricLog | None,
        first_row: int,
        stop: StopRequest | AgreedStop,
        profile: bool,
        start: float,
    ) -> None:
        self._trainer, self.stop = trainer, stop
        self._speed, self._validation = Speed(trainer, start), Validation(trainer, stop)
        self._bits, self._log = BitsPerByte(trainer, tokenizer), Log(trainer, metrics)
        # Of a pause the first ones complete the row; it is logged, and then saved. What is collected is the garbage of all.
        self.callbacks: list[Callback] = [
            self._speed,
            GoodSteps(trainer),
            self._validation,
            SourceValidation(trainer, stop),
            self._bits,
            self._log,
            *([Samples(trainer, tokenizer, metrics, first_row)] if trainer.config.sample_every else []),
            Checkpoints(trainer, writer),
            VerifiedData(trainer),
            *([Profiler(trainer)] if profile and trainer.world.is_first else []),
            GarbageCollection(trainer),
        ]

    def result(self) -> TrainResult:
        trainer, config, valid_loss = self._trainer, self._trainer.config, self._validation.loss
        tokens_per_second, mfu = self._speed.total()
        stopped = trainer.step < config.steps or math.isnan(valid_loss)
        return TrainResult(
            run=config.out,
            steps=trainer.step,
            num_parameters=num_parameters(config.model),
            train_loss=self._log.mean_of_last("loss"),
            valid_loss=math.nan if stopped else valid_loss,
            tokens_per_second=tokens_per_second,
            mfu=mfu,
            device=device_name(trainer.device),
            first_step_seconds=self._speed.first_step_seconds,
            skipped_steps=int(trainer.guard.skipped),
            stopped_by=self.stop.signal.name if self.stop.signal and stopped else None,
            valid_bits_per_byte=math.nan if stopped else self._bits.of_validation(valid_loss),
            train_bits_per_byte=self._log.mean_of_last("bits_per_byte"),
        )
