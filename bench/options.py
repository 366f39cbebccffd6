"""Options of the bench. This module does not import torch, so help and option errors are fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from ..errors import UserError
from ..files import require_file

StageName = Literal[
    "all", "machine", "ceilings", "tests", "kernels", "attention", "training", "generation", "memory", "run", "accounting",
    "inspect", "model", "overhead", "startup", "tokenizer", "tokenizer-long",
]  # fmt: skip
AttentionKernel = Literal["forward", "backward_q", "backward_kv", "backward_fused", "decode"]
"""Copy of `kernels.attention.configurations.Kernel`, whose module imports torch."""
MAX_MINUTES = 10_000


@dataclass(frozen=True)
class BenchConfig:
    """Options of `bench`."""

    stages: tyro.conf.Positional[tuple[StageName, ...]] = ("all",)
    """Stages to run. all takes 9 minutes on a GPU and skips jobs that do not fit; named stages have no time limit.

    Times come with peers and bounds. machine: clocks, throttling, other processes; ceilings: a copy and products; tests: the
    GPU-marked tests; memory: predicted and measured peaks; accounting: FLOPs by formula and by counter; inspect: compiled code
    of every kernel, without a GPU; model: limits of each kernel from its machine code, like inspect --model; overhead: cost of
    the training loop per step; startup: help, argument errors and imports in fresh processes; run, a real training run of
    minutes, and tokenizer-long, which takes an hour, are not part of all."""
    model: bool = False
    """With inspect: show the limits of each kernel on Hopper by a static model of its machine code, instead of registers."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    out: Path | None = None
    """Results file, JSON lines; by default bench/results/DEVICE/DATE.jsonl."""
    minutes: float | None = None
    """Time limit over all stages, which share it; jobs that do not fit are skipped. On a GPU most jobs are limited to 2
    minutes."""
    resume: Path | None = None
    """Results file of an earlier run on this machine to continue: finished jobs do not run again."""

    def __post_init__(self) -> None:
        for name in self.stages:
            if name not in get_args(StageName):
                raise UserError(f"stage {name!r} is unknown: expected one of {', '.join(get_args(StageName))}")
        if self.model and "inspect" not in self.stages:
            raise UserError(f"--model needs the stage inspect: the stages are {', '.join(self.stages)}")
        if self.minutes is not None and not 0 < self.minutes <= MAX_MINUTES:
            raise UserError(f"minutes is {self.minutes:g}: expected above 0 and at most {MAX_MINUTES:,}")
        if self.out is not None and self.resume is not None:
            raise UserError("--resume names the results file already: omit --out")

    @property
    def asked(self) -> tuple[str, ...]:
        """The stages to run."""
        return tuple("model" if self.model and name == "inspect" else name for name in self.stages)


@dataclass(frozen=True)
class TuneConfig:
    """Options of `tune`. Each fastest configuration is written to kernels/attention/configurations.json at once."""

    op: tyro.conf.Positional[Literal["attention"]]
    """Op to tune; bfloat16 and float16 share their configurations, float32 keeps its own."""
    kernels: tuple[AttentionKernel, ...] = get_args(AttentionKernel)
    """Kernels to tune."""
    head_dims: tuple[int, ...] = (64, 128, 256)
    """Head dims to tune: powers of two from 16 to 256; each also serves the smaller head dims down to the next power."""
    device: str = "auto"
    """cuda or auto."""
    out: Path | None = None
    """File of the measured table, JSON lines; by default bench/results/DEVICE/DATE.jsonl."""

    def __post_init__(self) -> None:
        for head_dim in self.head_dims:
            if not 16 <= head_dim <= 256 or head_dim.bit_count() != 1:
                raise UserError(f"head_dims has {head_dim}: expected powers of two from 16 to 256")


@dataclass(frozen=True)
class ReportConfig:
    """Options of `bench report`."""

    results: Path = Path("bench/results")
    """Folder of the results, with one folder per device."""
    out: Path = Path("bench/RESULTS.md")
    """Path of the page; its plots go to the folder plots next to it."""
    readme: Path | None = None
    """File whose table of measurements, between `<!-- bench:begin -->` and `<!-- bench:end -->`, is replaced; default:
    README.md."""
    overview: Path = Path("docs/bench.md")
    """File whose block between these markers is replaced: also what is not measured, and the predictions."""

    def __post_init__(self) -> None:
        if self.readme is not None:
            require_file(self.readme, "README")


@dataclass(frozen=True)
class CompareConfig:
    """Options of `bench compare`."""

    before: tyro.conf.Positional[Path]
    """Results file of the earlier run."""
    after: tyro.conf.Positional[Path]
    """Results file of the later run."""
    threshold: float = 0.05
    """Largest relative change of the time that counts as the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(f"threshold is {self.threshold}: expected at least 0 and below 1")
