"""A real training run: a preset on generated stories, as `tilewright train` runs it, until its last step or a time limit."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..train import preset
from ..train.metrics import read_metrics
from .jobs import Job, Row, Rows
from .trainers import write_corpus

# CS336 assignment 1, section 7: 327.68 M tokens.
PRESET = "tinystories-17m"
MEGABYTES, VALID_MEGABYTES = 200.0, 5.0
# The program of the run: `tilewright` without the exit hooks, in which PyTorch 2.11 can wait for its compilers for 5 minutes
# (pytorch/pytorch#162199).
PROGRAM = f"""
import os, sys, traceback
from {(__package__ or "").rpartition(".")[0]}.cli import main
status = 1
try:
    status = main(sys.argv[1:])
except BaseException:
    traceback.print_exc()
finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""
# Then the run gets a signal, writes a checkpoint and ends.
SECONDS = 150.0
CHECKPOINT_S = 30.0
OPTIONS: tuple[str, ...] = ("--cuda-graphs", "--eval-every", "250")


def _command(folder: Path) -> list[str]:
    """Write the texts and the tokenizer of a run to `folder`, and return the command that trains."""
    files = write_corpus(folder, MEGABYTES, VALID_MEGABYTES, preset(PRESET).model.vocab_size)
    data = ("--data.train", files.train[0], "--data.valid", files.valid, "--data.tokenizer", files.tokenizer)
    return [sys.executable, "-P", "-c", PROGRAM, "train", PRESET, *map(str, data), "--out", str(folder / "run"), *OPTIONS]


def run_until(command: Sequence[str], seconds: float) -> float:
    """Run a training command for at most `seconds`, then let it write its checkpoint; return its seconds.

    Raises a RuntimeError if the command fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.terminate()
                status = process.wait(CHECKPOINT_S)
        except BaseException:
            process.kill()
            raise
    if status:
        raise RuntimeError(f"the run ended with exit status {status}")
    return time.perf_counter() - start


def rows_of(metrics: Sequence[Mapping[str, Any]], seconds: float) -> Rows:
    """Yield the summary of a run from its metrics, and the points of its loss curve."""
    if not metrics:
        raise RuntimeError("the run ended before its first metrics")
    last = metrics[-1]
    validated = [row for row in metrics if row.get("valid_loss") is not None]
    row: Row = {"case": f"run {PRESET}", "variant": " ".join(OPTIONS)}
    yield row | {
        "step": last["step"],
        "tokens": last["tokens"],
        "whole_run_s": seconds,
        "tokens_per_s": statistics.median(each["tokens_per_second"] for each in metrics),
        "mfu": last.get("mfu") and statistics.median(each["mfu"] for each in metrics if each.get("mfu")),
        "loss": last["loss"],
        "valid_loss": validated[-1]["valid_loss"] if validated else None,
        "valid_bits_per_byte": validated[-1].get("valid_bits_per_byte") if validated else None,
    }
    for each in validated:
        names = ("step", "tokens", "loss", "valid_loss", "valid_bits_per_byte")
        yield row | {"table": "loss curve", **{name: each.get(name) for name in names}}


def measure_run() -> Rows:
    """Train, and yield the rows of the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = run_until(_command(folder), SECONDS)
        yield from rows_of(read_metrics(folder / "run"), seconds)


def run_jobs(device: torch.device) -> Iterator[Job]:
    """Yield one job: the run on a GPU."""
    yield Job(f"run {PRESET}", measure_run)
