"""The jobs of the bench's stages one after the other, in this process or in workers that may be lost."""

import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection

import torch

from ..train.device import prepare_allocator
from .ceilings import Device
from .jobs import DeviceLost, ask, is_lost, lacks_time, run_job
from .machine import state_row
from .stages import STAGES, Stage, tune_stage
from .tune import TuneConfig
from .watch import Event, Events, Had, left_out, report, watched

# What a worker runs.
PROGRAM = f"import sys; from {__name__} import work; work(int(sys.argv[1]), sys.argv[2])"
# Preparing a stage measures ceilings; the GPU's state is asked of nvidia-smi, which may take its time.
AROUND_S = 60.0


def _of_stage(name: str, stage: Stage, on: Device, deadline: float, had: Had, limited: bool) -> Events:
    """Run the jobs of a stage but for those of `had`; `DeviceLost` where one of them takes the GPU with it."""
    is_gpu = on.device.type == "cuda"
    if stage.cpu_s is None and not is_gpu:
        yield from left_out(name, stage.what, "no NVIDIA GPU")
        return

    def around(what: str) -> Event:
        return {"stage": name, "begin": what, "until": time.monotonic() + AROUND_S, "quiet": True}

    all_ended = (name, stage.what) not in had
    if all_ended:
        yield around(stage.what)
        try:
            jobs = [job for job in stage.jobs(on) if (name, job.case) not in had]
        except Exception as error:  # no ceilings, for one, where others hold all of the memory
            yield from left_out(name, stage.what, f"{type(error).__name__}: {error}"[:300])
            if is_lost(on.device):
                raise DeviceLost from error
            return
        for job in jobs:
            limit_s, has_ended = stage.limit_s if limited else math.inf, True
            until = min(deadline, time.monotonic() + limit_s)
            yield {"stage": name, "begin": job.case, "until": until, "last": until == deadline}
            try:
                for row in run_job(job, on.device, deadline, limit_s):
                    yield {"stage": name, "row": row}
                    has_ended &= not lacks_time(row)
            except DeviceLost:
                yield {"stage": name, "end": job.case}
                raise
            if has_ended:
                yield {"stage": name, "end": job.case}
            all_ended &= has_ended
    state = f"after {name}"
    if is_gpu and name != "machine" and (name, state) not in had:
        # While it is still warm: what a stage was slowed down by shows in it.
        yield around(state)
        yield {"stage": "machine", "row": state_row(on.device, state)}
    yield {"stage": name, "over": True, "complete": all_ended}


def run_here(
    stages: Mapping[str, Stage], device: torch.device, ends: Mapping[str, float], had: Had, limited: bool = False
) -> Events:
    """Run in this process what is left of the stages, each until its end of `ends` (of time.monotonic)."""
    on = Device(device)
    if device.type == "cuda":
        prepare_allocator(device)
        # Events and the clearing of the L2 cache go by the current device, which is what `cuda` without a number means.
        if device.index is not None:
            torch.cuda.set_device(device)
    ask(device)
    try:
        for name, stage in stages.items():
            yield from _of_stage(name, stage, on, ends[name], had, limited)
    except DeviceLost:
        yield {"lost": True}


def work(descriptor: int, request: str) -> None:
    """Be the worker that `_start` starts."""
    os.set_inheritable(descriptor, False)
    names, device, ends, had, tuned = json.loads(request)
    turns = frozenset((stage, case) for stage, case in had)
    known = STAGES if tuned is None else {"tune": tune_stage(TuneConfig(**tuned))}
    stages, status = {name: known[name] for name in names}, 1
    try:
        report(Connection(descriptor), run_here(stages, torch.device(device), ends, turns, limited=True))
        status = 0
    except KeyboardInterrupt:
        pass
    except Exception:
        traceback.print_exc()
    finally:
        # Without the hooks of libraries, which may wait for a context that is broken.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _start(
    device: torch.device,
    ends: Mapping[str, float],
    tune: TuneConfig | None,
    connection: Connection,
    left: Sequence[str],
    had: Had,
) -> subprocess.Popen[bytes]:
    tuned = tune and {"op": tune.op, "kernels": tune.kernels, "head_dims": tune.head_dims}
    request = json.dumps([left, str(device), ends, sorted(had, key=str), tuned])
    command = [sys.executable, "-P", "-c", PROGRAM, str(connection.fileno()), request]
    sys.stdout.flush()
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(connection.fileno(),), start_new_session=True)


def run_in_workers(
    stages: Mapping[str, Stage], device: torch.device, ends: Mapping[str, float], had: Had, tune: TuneConfig | None = None
) -> Events:
    """Run the stages, or what tunes, in other processes: a kernel that hangs, or kills its process, costs its job alone."""
    return watched(partial(_start, device, ends, tune), [*stages], had)
