"""Overhead of the training loop: batches, guard, metrics, signals; everything except the model and its optimizer."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from ..model import TransformerLM
from ..train import TrainConfig, preset, train
from ..train.trainer import Trainer, TrainingLoss
from .jobs import Job, Rows
from .timing import quantiles
from .trainers import write_corpus

PRESET = {"cpu": "stories-cpu", "cuda": "tinystories-17m"}
STEPS = 120
WARMUP_STEPS = 10


def _config(folder: Path, device: torch.device) -> TrainConfig:
    """Return a run of a preset on the embedded corpus; write its text and tokenizer to `folder`."""
    base = preset(PRESET[device.type])
    files = write_corpus(folder, 1.0, 0.1, min(base.model.vocab_size, 2048))
    # Exclude validations and checkpoints: both happen only at the last step, which is not timed.
    return dataclasses.replace(
        base, data=files, out=folder / "run", device=str(device), steps=STEPS, eval_every=STEPS, checkpoint_every=STEPS,
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=10), eval_sequences=1,
    )  # fmt: skip


class _BareStep:
    """The same step without the loop: forward, backward, clipping, AdamW, on a fixed batch."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        model = TransformerLM(config.model).to(trainer.device)
        model.load_state_dict(trainer.model.state_dict())
        model.compute_dtype = trainer.dtype
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.optimizer.lr, fused=True)
        compiled = trainer.device.type == "cuda"
        loss = TrainingLoss(model)
        self._loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
        self._max_grad_norm, self._tokens = config.optimizer.max_grad_norm, config.tokens_per_step
        inputs, targets = trainer.train_data.batch(trainer.samples(0))
        self._batch: tuple[Tensor, Tensor] = (inputs.to(trainer.device), targets.to(trainer.device))

    def __call__(self) -> None:
        (self._loss(*self._batch) / self._tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def measure_overhead(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Run `config` with a bare step before each of its steps; return the seconds of both per step, without warm-up.

    An iteration of the loop lasts from one call of `train_step` to the next, without the bare step between. Background threads
    count only as far as they slow down the loop or the bare step.
    """
    own_step = Trainer.train_step
    bare: list[_BareStep] = []
    looped_s: list[float] = []
    bare_s: list[float] = []
    resumed = [0.0]

    def train_step(trainer: Trainer) -> dict[str, Tensor | float]:
        synchronize = partial(torch.cuda.synchronize, trainer.device) if trainer.device.type == "cuda" else lambda: None
        synchronize()
        entered = time.perf_counter()
        if not bare:
            bare.append(_BareStep(trainer))
        start = time.perf_counter()
        bare[0]()
        synchronize()
        if trainer.step > WARMUP_STEPS:
            looped_s.append(entered - resumed[0])
            bare_s.append(time.perf_counter() - start)
        resumed[0] = time.perf_counter()
        return own_step(trainer)

    with patch.object(Trainer, "train_step", train_step):
        train(config)
    return looped_s, bare_s


def _measure(device: torch.device) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), device)
        looped_s, bare_s = measure_overhead(config)
    case = f"loop {PRESET[device.type]} batch {config.batch_size}x{config.model.context_length}"
    looped, bare = (quantiles([1e3 * seconds for seconds in column]) for column in (looped_s, bare_s))
    # Adjacent steps share the machine's noise, so their ratios vary less than their times.
    overhead = quantiles([a / b - 1 for a, b in zip(looped_s, bare_s, strict=True)])
    yield {"case": case, "variant": "model and optimizer", **dataclasses.asdict(bare)}
    yield {
        "case": case,
        "variant": "loop",
        **dataclasses.asdict(looped),
        "overhead": looped.p50_ms / bare.p50_ms - 1,
        "overhead_p20": overhead.p20_ms,
        "overhead_p50": overhead.p50_ms,
        "overhead_p80": overhead.p80_ms,
    }


def overhead_jobs(device: torch.device) -> Iterator[Job]:
    """Yield one job: an iteration of the loop against a bare step."""
    yield Job("overhead", partial(_measure, device))
