"""Measure training speed."""

import math
import sys
import time

import torch
from tqdm import tqdm

from ...kernels.device import gpu_of
from ...model.accounting import Policy, hardware_flops, model_flops_utilisation, operations
from ..schedule import sequences
from ..trainer import Trainer
from .callback import Callback, Pause


class Speed(Callback):
    """Adds tokens seen, tokens per second, MFU, HFU, the share of time spent waiting for data, and peak memory."""

    def __init__(self, trainer: Trainer, start: float) -> None:
        """Initialize with the `start` time of the run, from `time.perf_counter`."""
        super().__init__(trainer)
        self._start = start
        self.first_step_seconds = math.nan
        """Seconds from `start` to the end of the first step; NaN before that."""
        gpu = gpu_of(trainer.device)
        peak = gpu and gpu.peak_flops(trainer.peak)
        self._peak = peak and peak * trainer.world.size
        policy = Policy(checkpointing=trainer.model.activation_checkpointing, vocabulary="padded")
        flops = hardware_flops(operations(self.config.model, 1, None, policy))
        self._hardware_flops_per_token = flops / self.config.model.context_length
        self._intervals: list[tuple[int, float]] = []  # tokens, seconds
        self._waited = 0.0

    def after_step(self) -> None:
        """Print the time to the first step."""
        if not math.isnan(self.first_step_seconds):
            return
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        self.first_step_seconds = time.perf_counter() - self._start
        if not self.trainer.world.is_first:
            return
        tqdm.write(f"first step after {self.first_step_seconds:.1f} s", file=sys.stderr)
        if self._peak is not None:
            tqdm.write(
                f"MFU: model FLOPs (3x the forward pass, full attention) relative to {self._peak / 1e12:,.0f} TFLOP/s; "
                "HFU: includes recomputation",
                file=sys.stderr,
            )

    def in_pause(self, pause: Pause) -> None:
        """Measure the steps since the last pause."""
        if not pause.num_steps:
            return
        trainer, config, row = self.trainer, self.config, pause.row
        length, step = config.model.context_length, trainer.step
        row["tokens"] = sequences(config, 0, step) * length
        tokens = sequences(config, step - pause.num_steps, step) * length
        seconds, waited = pause.seconds, trainer.batches.waited
        row["tokens_per_second"] = tokens / seconds
        row["mfu"] = self._mfu(tokens / seconds)
        row["hfu"] = None if self._peak is None else self._hardware_flops_per_token * tokens / seconds / self._peak
        row["data_wait"] = (waited - self._waited) / seconds
        row["skipped_steps"] = int(trainer.guard.skipped)
        if trainer.device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
        self._waited = waited
        self._intervals.append((tokens, seconds))

    def total(self) -> tuple[float, float | None]:
        """Return tokens per second and MFU of the run; exclude the first interval, which compiles, if there are others."""
        tokens, seconds = (sum(column) for column in zip(*(self._intervals[1:] or self._intervals or [(0, 1.0)]), strict=True))
        return tokens / seconds, self._mfu(tokens / seconds)

    def _mfu(self, tokens_per_second: float) -> float | None:
        return model_flops_utilisation(self.config.model, tokens_per_second, self._peak)
