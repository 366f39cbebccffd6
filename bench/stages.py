"""Stages of the bench in their order, with their time limits."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from ..kernels.inspect import ARCHITECTURES, all_cases, inspect
from .accounting import accounting_jobs
from .ceilings import Device
from .generation import generation_jobs
from .gpu_tests import run_gpu_tests
from .jobs import Job, Rows
from .kernels import kernel_jobs
from .machine import machine_rows
from .memory import memory_jobs
from .options import TuneConfig
from .overhead import overhead_jobs
from .real_run import PRESET, SECONDS, run_jobs
from .startup import startup_jobs
from .static_model import model_jobs
from .tokenizer import LONG, bench_tokenizer
from .training import training_jobs
from .tune import tune_jobs


@dataclass(frozen=True)
class Stage:
    """A named part of the bench."""

    what: str
    """Description of the measurement."""
    jobs: Callable[[Device], Iterator[Job]]
    gpu_s: float
    """Seconds in a run of all stages on a GPU; unused time goes to the next stage.

    0 for a stage that needs no GPU: it gets the remaining time."""
    cpu_s: float | None = None
    """Seconds in a run of all stages without a GPU; None if the stage needs a GPU."""
    on_any_machine: bool = False
    """Whether the figures do not depend on the machine."""
    in_all: bool = True
    limit_s: float = 120
    """Most seconds of one job on a GPU, in every run; a job that then does not end is killed."""
    needs: tuple[str, ...] = ("machine",)
    """Stages that must run too, to interpret the figures on a GPU."""


def _inspect(architecture: str) -> Rows:
    # The compilers run without the GIL.
    pool = ThreadPoolExecutor()
    try:
        for report in pool.map(lambda case: inspect(case, architecture), all_cases(architecture)):
            row = asdict(report)
            yield {"case": row.pop("name"), "variant": row.pop("architecture"), **row}
    finally:
        pool.shutdown(cancel_futures=True)


def _inspect_jobs() -> Iterator[Job]:
    for architecture in ARCHITECTURES:
        yield Job(f"inspect {architecture}", partial(_inspect, architecture))


_CEILINGS = ("machine", "ceilings")
STAGES: dict[str, Stage] = {
    "machine": Stage(
        "clocks, throttling and other processes", lambda on: iter([Job("GPU", partial(machine_rows, on.device))]), 5
    ),
    "ceilings": Stage("speed of a copy and of matrix products", lambda on: iter([Job("ceiling", on.ceiling_rows)]), 15),
    "tests": Stage("the GPU-marked tests", lambda on: iter([Job("GPU-marked tests", run_gpu_tests)]), 75, limit_s=600),
    "kernels": Stage(
        "ops against PyTorch, torch.compile, Liger-Kernel, cut-cross-entropy and quack",
        lambda on: kernel_jobs("own", on.device, on.ceilings),
        90,
        needs=_CEILINGS,
    ),
    "attention": Stage(
        "attention and decoding against SDPA's backends, flex_attention and flash-attn",
        lambda on: kernel_jobs("attention", on.device, on.ceilings),
        90,
        needs=_CEILINGS,
    ),
    "training": Stage("training steps and their MFU", lambda on: training_jobs(on.device), 145, 60, limit_s=480),
    "generation": Stage(
        "generation against the bandwidth limit",
        lambda on: generation_jobs(on.device, on.ceilings if on.device.type == "cuda" else None),
        30,
        30,
        needs=_CEILINGS,
    ),
    "memory": Stage("peak memory, predicted and measured", lambda on: memory_jobs(on.device), 30),
    "run": Stage(
        f"{PRESET} trained on generated stories, for {SECONDS:.0f} s at most",
        lambda on: run_jobs(on.device),
        0,
        in_all=False,
        limit_s=SECONDS + 80,
    ),
    "accounting": Stage("FLOPs by formula and by PyTorch's counter", lambda on: accounting_jobs(), 5, 40, True),
    "inspect": Stage("compiled code of every kernel", lambda on: _inspect_jobs(), 0, 130, True, limit_s=480),
    "model": Stage(
        "limits of each kernel, by a static model", lambda on: model_jobs(), 0, 0, True, in_all=False, limit_s=600, needs=()
    ),
    "overhead": Stage("cost of the training loop per step", lambda on: overhead_jobs(on.device), 45, 60, limit_s=240),
    "startup": Stage("the time until a command shows its help", lambda on: startup_jobs(), 0, 20, True, needs=()),
    "tokenizer": Stage(
        "the tokenizer against its peers", lambda on: iter([Job("tokenizer", bench_tokenizer)]), 0, 240, True, limit_s=540
    ),
    "tokenizer-long": Stage(
        "the tokenizer on 100 MB and on lines without a break",
        lambda on: iter([Job("tokenizer", partial(bench_tokenizer, LONG))]),
        0,
        0,
        on_any_machine=True,
        in_all=False,
        limit_s=7200,
    ),
}


def tune_stage(config: TuneConfig) -> Stage:
    """Return the tuning of a GPU, which runs like a stage but is not part of the bench."""
    # A job compiles in parallel most of the time. A candidate that hangs costs all of this.
    limit_s = max(150.0, 1200.0 / min(8, os.cpu_count() or 1))
    return Stage("attention's launches", lambda on: tune_jobs(config, on.device), 0, limit_s=limit_s)


def chosen_stages(names: Iterable[str], is_gpu: bool) -> dict[str, Stage]:
    """Return the requested stages in order; on a GPU with the stages that they need."""
    asked = {*names}
    if "all" in asked:
        asked |= {name for name, stage in STAGES.items() if stage.in_all}
    if is_gpu:
        asked |= {need for name in asked & STAGES.keys() for need in STAGES[name].needs}
    return {name: stage for name, stage in STAGES.items() if name in asked}
