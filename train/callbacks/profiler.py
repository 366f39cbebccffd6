"""Profile a few steps of a run: trace, memory snapshot, and the time of each group of kernels."""

import sys
import time
from typing import Literal

import torch
from tqdm import tqdm

from ..profile import breakdown, make_profiler, profiled_events
from ..trainer import Trainer
from .callback import Callback, Pause

FOLDER_NAME = "profile"
WARMUP_STEPS = 3
STEPS = 3


class Profiler(Callback):
    """Skips 3 warm-up steps, times 3 consecutive steps without the profiler, and records 3 consecutive steps with it.

    Writes `trace.json` (for chrome://tracing or Perfetto) and, on a GPU, `memory.pickle` (for PyTorch's memory visualizer) to
    the run's folder `profile`, and prints the time of each group of kernels to stderr.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._folder, self._device = self.config.out / FOLDER_NAME, trainer.device
        self._phase: Literal["warming up", "timing", "recording", "done"] = "warming up"
        self._left = WARMUP_STEPS
        self._mark = self._seconds = 0.0
        self._profiler: torch.profiler.profile | None = None

    def after_step(self) -> None:
        """Count the step, and enter the next phase when the current one is complete."""
        self._left -= 1
        if self._left > 0 or self._phase == "done":
            return
        if self._phase == "warming up":
            self._time()
        elif self._phase == "timing":
            self._seconds = self._now() - self._mark
            self._record()
        else:
            self._end()

    def in_pause(self, pause: Pause) -> None:
        """Restart the current phase if a validation, samples or a checkpoint interrupted it."""
        config = self.config
        if not any(self.is_due(every) for every in (config.eval_every, config.sample_every, config.checkpoint_every)):
            return
        if self._phase == "timing":
            self._time()
        elif self._phase == "recording":
            self._stop_recording()
            self._record()

    def close(self) -> None:
        """Stop an incomplete recording, and print that no profile was written."""
        if self._phase != "done":
            tqdm.write(
                f"no profile was written: it needs {WARMUP_STEPS} steps, then twice {STEPS} consecutive steps without a "
                "validation, samples or a checkpoint",
                file=sys.stderr,
            )
        self._stop_recording()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _time(self) -> None:
        self._phase, self._left, self._mark = "timing", STEPS, self._now()

    def _record(self) -> None:
        self._phase, self._left = "recording", STEPS
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profiler = make_profiler(activities)
        self._profiler.start()

    def _stop_recording(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self._profiler = None
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _end(self) -> None:
        profiler = self._profiler
        assert profiler is not None
        self._now()
        self._folder.mkdir(exist_ok=True)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
        self._stop_recording()
        self._phase = "done"
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        groups = breakdown(profiled_events(profiler), self._seconds)
        total = sum(groups.values())
        lines = [f"a step takes {1e3 * self._seconds / STEPS:.1f} ms; mean over {STEPS} steps, trace in {self._folder}:"]
        for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
            if seconds:
                lines.append(f"  {group:14} {1e3 * seconds / STEPS:8.2f} ms/step  {seconds / total:6.1%}")
        tqdm.write("\n".join(lines), file=sys.stderr)
