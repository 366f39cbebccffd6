"""Run one training run, from its configuration to its result."""

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
from .callbacks.divergence import DivergenceCheck
from .callbacks.garbage import GarbageCollection
from .callbacks.log import Log
from .callbacks.profiler import Profiler
from .callbacks.samples import Samples
from .callbacks.source_validation import SourceValidation
from .callbacks.speed import Speed
from .callbacks.validation import Validation
from .callbacks.verified_data import VerifiedData
from .checkpoint.writer import CheckpointWriter
from .config import Extend, Resume, TrainConfig, holds_run
from .data.record import validation_notes
from .distributed import AgreedStop, Layout, World, ignore_sigterm_after_error, join
from .folder import mark_beginning, read_data_record
from .loop import Loop
from .metrics import MetricLog
from .opening import begin, open_run, resume_run
from .parallel import open_writer
from .plot import can_plot, plot_losses
from .signals import StopRequest
from .trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    run: Path
    steps: int
    num_parameters: int
    train_loss: float
    """Mean training loss over the last tenth of the logged steps, in nats per token."""
    valid_loss: float
    """Validation loss after the last step, in nats per token; NaN if a signal stopped the run."""
    tokens_per_second: float
    """Training speed without validation, checkpoints and the first logged steps, which compile."""
    mfu: float | None
    """Share of the device's dense peak: 3x the forward FLOPs with full (not causal) attention; None if the peak is unknown."""
    device: str
    first_step_seconds: float = math.nan
    """Seconds from the call to the end of the first step, including data, model and compilation; NaN if no step was taken."""
    skipped_steps: int = 0
    """Number of steps skipped because of a non-finite loss or a loss spike."""
    stopped_by: str | None = None
    """Name of the signal that stopped the run before its last step."""
    valid_bits_per_byte: float = math.nan
    """`valid_loss` in bits per byte of the validation text, which is comparable across tokenizers."""
    train_bits_per_byte: float = math.nan
    """`train_loss` in bits per byte of the training text."""


def train(
    config: TrainConfig,
    *,
    resume: Resume | None = None,
    extend: Extend | None = None,
    accept_valid: bool = False,
    profile: bool = False,
) -> TrainResult:
    """Train `config` in the folder `config.out`, or resume the run there; return the result.

    The folder receives the configuration, the tokenizer, `metrics.jsonl`, `loss.png` and checkpoints. SIGTERM, SIGINT and
    SIGUSR1 stop the run after the current step, with a checkpoint. Under torchrun, all processes train one run.

    Args:
        config: The run.
        resume: A checkpoint of the run, or "auto": the newest valid checkpoint, or a new run if the folder contains none. With
            the same device and versions, a resumed run is bit-identical to an uninterrupted one. `config.steps` may be larger
            than before if the schedule allows it.
        extend: Which other options may change when the run resumes (see `config.Extend`).
        accept_valid: Allow other validation data when the run resumes.
        profile: Record a few steps with the profiler (see `callbacks.profiler`).
    """
    start = time.perf_counter()
    with join(config.device, Layout.parse(config.parallel)) as world:
        if resume == "auto" and not world.on_first(lambda: holds_run(config.out)):
            if world.is_first:
                print(f"{config.out} contains no run to resume: starting a new one", file=sys.stderr)
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
    # StopRequest is the outermost context: signals are recorded until everything else is closed.
    with StopRequest() as stop, ignore_sigterm_after_error(), contextlib.closing(trainer):
        if not resume:
            world.on_first(lambda: mark_beginning(config.out))
        with open_writer(config, world) as writer:
            unfinished_row = resume_run(trainer, tokenizer, resume) if resume else begin(trainer, tokenizer, writer)
            # The row of an unfinished step is written again, even if it was completed before.
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
            if world.is_first and can_plot():
                plot_losses(config.out, config.history)
            return result


class _Features:
    """The callbacks of a run, and the result computed from them."""

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
        # The order matters: the first callbacks complete the metrics row, then it is logged, then saved. Garbage collection is
        # last.
        self.callbacks: list[Callback] = [
            self._speed,
            DivergenceCheck(trainer),
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
