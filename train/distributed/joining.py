"""Set-up and tear-down of the process group of a job."""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from ...errors import UserError
from ..device import resolve_device
from .errors import set_sigterm_handler
from .layout import ALONE, Layout
from .store import torchrun_store
from .world import World

# Timeouts of collectives in a step, and of those on the host: the first process may encode texts for hours.
STEP_TIMEOUT = timedelta(minutes=10)
HOST_TIMEOUT = timedelta(days=1)


@contextlib.contextmanager
def join(device: str, layout: Layout = ALONE) -> Iterator[World]:
    """Join the job that torchrun's environment describes, if any, and leave it at the end of the context.

    `device` is resolved by `resolve_device`; each process uses its own GPU. An error in the context aborts the process group,
    so that the other processes fail instead of waiting for this one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(resolve_device(device), layout=layout)
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE is {size}, but {name} is not set; start with torchrun, or unset WORLD_SIZE")
    chosen = _own_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend, rank = "nccl" if chosen.type == "cuda" else "gloo", int(os.environ["RANK"])
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        store = torchrun_store(STEP_TIMEOUT)
        if store is not None:
            # A new prefix for each call, because the same processes may join again for another run.
            store = PrefixStore(f"join/{store.add(f'joined/{rank}', 1)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
        hosts = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        assert isinstance(hosts, dist.ProcessGroup)
        yield World(chosen, rank, size, hosts, layout)
        # No process leaves successfully while another can still fail.
        dist.barrier(hosts)
    except BaseException as error:
        set_sigterm_handler(signal.SIG_IGN)
        if dist.is_initialized():
            # An orderly shutdown would wait for pending collectives.
            dist.distributed_c10d._abort_process_group()
        if _is_loss_of_another(error):
            raise UserError("lost connection to another process of the job: see the error message of that process") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # The caller may catch the error and continue.
        set_sigterm_handler(sigterm)


def _own_device(name: str) -> torch.device:
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"device is {name}: each process uses its own GPU; choose cuda")
    num_gpus, num_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_processes > num_gpus:
        raise UserError(f"torchrun started {num_processes} processes on this machine with {num_gpus} GPUs; start {num_gpus}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _is_loss_of_another(error: BaseException) -> bool:
    # Gloo raises a plain RuntimeError.
    lost_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    return lost_store or (type(error) is RuntimeError and "gloo" in str(error))
