"""Run the jobs of the stages one after the other, in this process or in replaceable workers."""

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
from .jobs import DeviceLost, is_lost, lacks_time, probe, run_job
from .machine import state_row
from .options import TuneConfig
from .stages import STAGES, Stage, tune_stage
from .watch import DoneJobs, Event, Events, report, skipped_stage, watched

# Program of a worker.
PROGRAM = f"import sys; from {__name__} import work; work(int(sys.argv[1]), sys.argv[2])"
# Limit for work between jobs: preparing a stage measures ceilings, and nvidia-smi can be slow.
SETUP_S = 60.0


def _run_stage(name: str, stage: Stage, on: Device, deadline: float, done: DoneJobs, limited: bool) -> Events:
    """Run the jobs of a stage except those in `done`; raise `DeviceLost` if a job breaks the GPU's context."""
    is_gpu = on.device.type == "cuda"
    if stage.cpu_s is None and not is_gpu:
        yield from skipped_stage(name, stage.what, "no NVIDIA GPU")
        return

    def setup(what: str) -> Event:
        return {"stage": name, "begin": what, "until": time.monotonic() + SETUP_S, "quiet": True}

    all_ended = (name, stage.what) not in done
    if all_ended:
        yield setup(stage.what)
        try:
            jobs = [job for job in stage.jobs(on) if (name, job.case) not in done]
        except Exception as error:  # for example no memory left to measure ceilings
            yield from skipped_stage(name, stage.what, f"{type(error).__name__}: {error}"[:300])
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
    if is_gpu and name != "machine" and (name, state) not in done:
        # Read the state while the GPU is still warm: it shows what slowed the stage down.
        yield setup(state)
        yield {"stage": "machine", "row": state_row(on.device, state)}
    yield {"stage": name, "over": True, "complete": all_ended}


def run_here(
    stages: Mapping[str, Stage], device: torch.device, ends: Mapping[str, float], done: DoneJobs, limited: bool = False
) -> Events:
    """Run the remaining jobs of the stages in this process, each stage until its deadline in `ends` (of time.monotonic)."""
    on = Device(device)
    if device.type == "cuda":
        prepare_allocator(device)
        # Events and the clearing of the L2 cache use the current device.
        if device.index is not None:
            torch.cuda.set_device(device)
    probe(device)
    try:
        for name, stage in stages.items():
            yield from _run_stage(name, stage, on, ends[name], done, limited)
    except DeviceLost:
        yield {"lost": True}


def work(descriptor: int, request: str) -> None:
    """Run the worker program that `_start` starts."""
    os.set_inheritable(descriptor, False)
    names, device, ends, done, tuned = json.loads(request)
    done_jobs = frozenset((stage, case) for stage, case in done)
    known = STAGES if tuned is None else {"tune": tune_stage(TuneConfig(**tuned))}
    stages, status = {name: known[name] for name in names}, 1
    try:
        report(Connection(descriptor), run_here(stages, torch.device(device), ends, done_jobs, limited=True))
        status = 0
    except KeyboardInterrupt:
        pass
    except Exception:
        traceback.print_exc()
    finally:
        # Skip the exit hooks of libraries, which can wait for a broken context.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _start(
    device: torch.device,
    ends: Mapping[str, float],
    tune: TuneConfig | None,
    connection: Connection,
    left: Sequence[str],
    done: DoneJobs,
) -> subprocess.Popen[bytes]:
    tuned = tune and {"op": tune.op, "kernels": tune.kernels, "head_dims": tune.head_dims}
    request = json.dumps([left, str(device), ends, sorted(done, key=str), tuned])
    command = [sys.executable, "-P", "-c", PROGRAM, str(connection.fileno()), request]
    sys.stdout.flush()
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(connection.fileno(),), start_new_session=True)


def run_in_workers(
    stages: Mapping[str, Stage], device: torch.device, ends: Mapping[str, float], done: DoneJobs, tune: TuneConfig | None = None
) -> Events:
    """Run the stages, or the tuning, in workers, so that a kernel that hangs or kills its process costs only its own job."""
    return watched(partial(_start, device, ends, tune), [*stages], done)
