"""Runs a test file as two processes of one group, for what a single process cannot show."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_in_two_processes(file: str, folder: Path) -> None:
    """Run `file` as a program in two processes, which `as_one_of_two` joins; a check that fails in one fails here."""
    command = [sys.executable, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [[*command, str(rank), str(folder / "store")] for rank in range(2)]
    processes = [subprocess.Popen(rank, env=environment, **pipes) for rank in ranks]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


def as_one_of_two(*checks: Callable[[], None]) -> None:
    """Run the checks as one of the two processes, which the command line says."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for check in checks:
        check()
    dist.destroy_process_group()
