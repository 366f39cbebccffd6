"""The processes of a job, as torchrun starts them, one a GPU: who each is, what they agree on, and how they end together."""

import contextlib
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..errors import UserError
from ..model.transformer import IGNORED_TARGET
from .config import TrainConfig
from .device import resolve_device
from .signals import StopRequest

T = TypeVar("T")

# How long a process waits for the others: in a step, and while the first one does what may take hours, such as to encode texts.
STEP_TIMEOUT = timedelta(minutes=10)
HOST_TIMEOUT = timedelta(days=1)


class World:
    """The processes of a job; by default this one alone, where nothing is communicated.

    All processes call the methods that communicate, in the same order.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, hosts: dist.ProcessGroup | None = None) -> None:
        self.device, self.rank, self.size = device, rank, size
        # Of the hosts alone: what goes over it waits for no GPU, and no GPU for it.
        self._hosts = hosts

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str) -> Iterator["World"]:
        """Join the processes that torchrun's environment speaks of, if any, and leave them at the end of the context.

        `device` is as in `resolve_device`; each process takes a GPU of its own. An error in the context ends the job: the other
        processes no longer wait for this one.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(resolve_device(device))
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
            store = _store(STEP_TIMEOUT)
            if store is not None:
                # Of this time only: processes may join each other again for a next run.
                store = PrefixStore(f"join/{store.add(f'joined/{rank}', 1)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
            hosts = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
            assert isinstance(hosts, dist.ProcessGroup)
            yield cls(chosen, rank, size, hosts)
            # Nobody leaves as if all were well while another can still fail.
            dist.barrier(hosts)
        except BaseException as error:
            _on_sigterm(signal.SIG_IGN)
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
            _on_sigterm(sigterm)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """Return in all processes what `function` returns in the first one, which alone runs it, or raise its `UserError`."""
        if self.size == 1:
            return function()
        result, failure = None, None
        if self.is_first:
            try:
                result = function()
            except UserError as error:
                failure = error
        outcome = [(result, failure)]
        dist.broadcast_object_list(outcome, src=0, group=self._hosts)
        result, failure = outcome[0]
        if failure is not None:
            raise failure
        return result  # pyright: ignore[reportReturnType]

    def first_before_others(self, function: Callable[[], T]) -> T:
        """Return what `function` returns here; the others run it when the first process has, or raise its `UserError`."""
        results: list[T] = []
        # What it returns stays where it is.
        self.on_first(lambda: results.append(function()))
        return results[0] if results else function()

    def gather(self, value: T) -> list[T]:
        """Return the value of each process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._hosts)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """Add up the processes' values in place, in the order of the device's work; the host does not wait."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def rows(self, samples: range) -> range:
        """Return this process's part of the samples of a step, whose number has to divide by that of the processes."""
        share = len(samples) // self.size
        return samples[self.rank * share : (self.rank + 1) * share]

    def own_rows(self, inputs: Tensor, targets: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Return this process's rows of a batch, (B, T) each; where B does not divide, rows with ignored targets fill up."""
        missing = -len(inputs) % self.size
        batch = inputs, targets, *others
        if missing:
            inputs, _, *rest = (torch.cat([tensor, tensor[:1].expand(missing, -1)]) for tensor in batch)
            batch = inputs, F.pad(targets, (0, 0, 0, missing), value=IGNORED_TARGET), *rest
        own = self.rows(range(len(inputs)))
        return tuple(tensor[own.start : own.stop] for tensor in batch)

    def agreed(self, stop: StopRequest) -> "StopRequest | AgreedStop":
        """Return what is true in all processes at the same time once `stop` is in any."""
        return stop if self.size == 1 else AgreedStop(stop, self._hosts)


class AgreedStop:
    """A `StopRequest` of all processes, which ask it equally often.

    A question is answered with what all knew when it was asked before: nobody waits for the answer to travel.
    """

    def __init__(self, own: StopRequest, group: dist.ProcessGroup | None) -> None:
        self.signal: signal.Signals | None = None
        self._own, self._group = own, group
        self._asked: tuple[dist.Work, Tensor] | None = None

    def __bool__(self) -> bool:
        if self._asked is not None:
            work, number = self._asked
            work.wait()
            self.signal = signal.Signals(int(number)) if number else None
        self._asked = None
        if self.signal is None:
            number = torch.tensor(self._own.signal or 0)
            work = dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True)
            assert work is not None
            self._asked = work, number
        return self.signal is not None


def check_parallel(config: TrainConfig, world: World) -> None:
    """Raise a `UserError` where a run cannot be spread over these processes."""
    if config.cuda_graphs and (world.size > 1 or world.device.type != "cuda"):
        raise UserError(
            f"cuda_graphs is set: that needs one process, on a GPU, not {world.size} on {world.device.type}; "
            "choose --no-cuda-graphs"
        )
    if world.size == 1:
        return
    if config.batch_size != "auto" and config.batch_size % world.size:
        raise UserError(f"batch_size is {config.batch_size}: it must be a multiple of the number of processes, {world.size}")
    if config.parallel == "fsdp" and config.optimizer.name == "muon":
        raise UserError("optimizer.name is muon, which needs whole matrices: choose adamw with parallel fsdp, or parallel ddp")


def is_first_process() -> bool:
    """Return whether this process is the first of those that torchrun started, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def says_why_it_ends() -> Iterator[None]:
    """After an error in the context, ignore SIGTERM where there are other processes.

    With it torchrun ends them once one has ended, before they can say what they have met.
    """
    try:
        yield
    except BaseException:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _on_sigterm(signal.SIG_IGN)
        raise


def report_error(message: str) -> None:
    """Print an error on stderr, once however many processes meet it."""
    if _is_new(message):
        print(f"tilewright: error: {message}", file=sys.stderr, flush=True)


def _store(timeout: timedelta) -> Store | None:
    """Return the store of torchrun, to which all its processes have access before they have found each other.

    None where it has none of its own, or several machines take part.
    """
    several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if several or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
    # It outlives a restart, with the addresses of processes that are gone (PyTorch issue 135712). Only on one machine does this
    # count say the same to all.
    return PrefixStore(f"tilewright/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _is_new(message: str) -> bool:
    try:
        store = _store(timedelta(seconds=10))
        return store is None or store.add(f"error/{zlib.crc32(message.encode())}", 1) == 1
    except RuntimeError:
        return True


def _on_sigterm(handler: Any) -> None:
    # Only the main thread may, and None stands for a handler that was not set from Python.
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


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
