"""A few steps of a run under the profiler: their trace, their memory, and where their time went."""

import sys
import time
from typing import Literal

import torch

from ..profile import breakdown, profiled_events
from ..trainer import Trainer
from .callback import Callback, Pause

FOLDER_NAME = "profile"
WARMUP_STEPS = 3
STEPS = 3


class Profiler(Callback):
    """Watches the steps of a process: the first 3 warm up, 3 in a row are timed as they are, and 3 in a row recorded.

    `trace.json` (for chrome://tracing or Perfetto) and, on a GPU, `memory.pickle` (for PyTorch's memory visualiser, which reads
    nothing else) go to the run's folder `profile`; the shares of the time are printed on stderr.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._folder, self._device = self.config.out / FOLDER_NAME, trainer.device
        self._phase: Literal["warming up", "timing", "recording", "done"] = "warming up"
        self._left = WARMUP_STEPS
        self._mark = self._seconds = 0.0
        self._profiler: torch.profiler.profile | None = None

    def after_step(self) -> None:
        """Take note of a finished step."""
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
        """Begin again with what is being timed or recorded, where more than a row of metrics has come between its steps."""
        config = self.config
        if not any(self.is_due(every) for every in (config.eval_every, config.sample_every, config.checkpoint_every)):
            return
        if self._phase == "timing":
            self._time()
        elif self._phase == "recording":
            self._stop_recording()
            self._record()

    def close(self) -> None:
        """End a recording that the run's end has cut short; say so."""
        if self._phase != "done":
            print(
                f"no profile was written: it needs {WARMUP_STEPS} steps, then twice {STEPS} without a validation or a "
                "checkpoint in between",
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
        self._profiler = torch.profiler.profile(activities=activities)
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
        print(
            f"a step takes {1e3 * self._seconds / STEPS:.1f} ms; the kernels of {STEPS} steps, in {self._folder}:",
            file=sys.stderr,
        )
        for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
            if seconds:
                print(f"  {group:14} {1e3 * seconds / STEPS:8.2f} ms a step  {seconds / total:6.1%}", file=sys.stderr)
