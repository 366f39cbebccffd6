"""Run a test file as two processes of one process group."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_in_two_processes(file: str, folder: Path) -> None:
    """Run `file` as a program in two processes, which call `as_one_of_two`; fail if one of them fails."""
    command = [sys.executable, file]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [[*command, str(rank), str(folder / "store")] for rank in range(2)]
    processes = [subprocess.Popen(rank, env=environment, **pipes) for rank in ranks]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


def as_one_of_two(*checks: Callable[[], None]) -> None:
    """Run the checks as one of the two processes; the command line gives the rank and the store."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    if importlib.util.find_spec("triton") is not None:
        from interpreter import patch_interpreter

        patch_interpreter()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for check in checks:
        check()
    dist.destroy_process_group()
