"""How the processes of a job find each other, and how they leave."""

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
from .errors import on_sigterm
from .layout import ALONE, Layout
from .store import torchrun_store
from .world import World

# How long a process waits for the others: in a step, and while the first one does what may take hours, such as to encode texts.
STEP_TIMEOUT = timedelta(minutes=10)
HOST_TIMEOUT = timedelta(days=1)


@contextlib.contextmanager
def join(device: str, layout: Layout = ALONE) -> Iterator[World]:
    """Join the processes that torchrun's environment speaks of, if any, and leave them at the end of the context.

    `device` is as in `resolve_device`; each process takes a GPU of its own. An error in the context ends the job: the other
    processes no longer wait for this one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(resolve_device(device), layout=layout)
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE is {size}, but {name} is not set: start with torchrun, or unset WORLD_SIZE")
    chosen = _own_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend, rank = "nccl" if chosen.type == "cuda" else "gloo", int(os.environ["RANK"])
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        store = torchrun_store(STEP_TIMEOUT)
        if store is not None:
            # Of this time only: processes may join each other again for a next run.
            store = PrefixStore(f"join/{store.add(f'joined/{rank}', 1)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
        hosts = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        assert isinstance(hosts, dist.ProcessGroup)
        yield World(chosen, rank, size, hosts, layout)
        # Nobody leaves as if all were well while another can still fail.
        dist.barrier(hosts)
    except BaseException as error:
        on_sigterm(signal.SIG_IGN)
        if dist.is_initialized():
            # To leave in good order, it would have to wait for what it has asked of the others.
            dist.distributed_c10d._abort_process_group()
        if _is_loss_of_another(error):
            raise UserError("a process of the job has ended, or could not be reached: its own message says why") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # A program that catches the error goes on.
        on_sigterm(sigterm)


def _own_device(name: str) -> torch.device:
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"device is {name}: each process takes a GPU of its own; choose cuda")
    num_gpus, num_processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_processes > num_gpus:
        raise UserError(f"torchrun starts {num_processes} processes here, torch.cuda finds {num_gpus} GPUs: start {num_gpus}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _is_loss_of_another(error: BaseException) -> bool:
    # Gloo has no exception of its own.
    lost_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    return lost_store or (type(error) is RuntimeError and "gloo" in str(error))
