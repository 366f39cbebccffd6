"""Time to start: commands that show help or reject an argument, and the import of the kernels, each in a fresh process."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from .jobs import Job, Rows
from .timing import quantiles, time_variants

ROUNDS = 3
COMMANDS = (
    "--help",
    "account gpt2-xl --gpu unknown",
    "bench report --help",
    "tokenizer train --help",
    "train gpt2-small --help",
)
# Prints the seconds of both imports.
IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import tilewright.kernels
print(middle - start, time.perf_counter() - middle)
"""


def _run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True).stdout


def _commands() -> Rows:
    variants = {name: partial(_run, "-m", "tilewright", *name.split()) for name in COMMANDS}
    for name, times in time_variants(variants, torch.device("cpu"), ROUNDS).items():
        yield {"case": f"tilewright {name}", **asdict(times)}


def _imports() -> Rows:
    _run("-c", IMPORTS)  # reads the files from disk once
    rounds = [[1e3 * float(seconds) for seconds in _run("-c", IMPORTS).split()] for _ in range(ROUNDS)]
    names = ("import torch", "import tilewright.kernels, after torch")
    for name, samples in zip(names, zip(*rounds, strict=True), strict=True):
        yield {"case": name, **asdict(quantiles(samples))}


def startup_jobs() -> Iterator[Job]:
    """Yield two measurements: commands that need no torch, and imports."""
    yield Job("commands", _commands)
    yield Job("imports", _imports)
