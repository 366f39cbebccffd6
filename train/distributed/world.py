"""The processes of a job and their communication."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...model.transformer import IGNORED_TARGET
from ..signals import StopRequest
from .agreed_stop import AgreedStop
from .layout import ALONE, Layout

T = TypeVar("T")


class World:
    """The processes of a job. By default a single process, which does not communicate.

    All processes must call the communicating methods in the same order. The ranks of a tp group are consecutive; tp groups that
    share sequences (cp) follow each other. All processes of such a tp x cp group read the same rows, as one of `num_readers`.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        hosts: dist.ProcessGroup | None = None,
        layout: Layout = ALONE,
    ) -> None:
        self.device, self.rank, self.size, self.layout = device, rank, size, layout
        self.times_read = layout.tp * layout.cp
        """The number of processes that read the same rows."""
        self.num_readers = size // self.times_read
        self.num_replicas = size // layout.tp
        """The number of processes over which the gradient of a weight is averaged."""
        # A gloo group, so that communication between hosts does not synchronize with the GPUs.
        self._hosts = hosts

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """Run `function` in the first process. Return its result, or raise its `UserError`, in all processes."""
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
        """Run `function` in the first process, then in the others, and return the local result.

        If the first process raises a `UserError`, all processes raise it.
        """
        results: list[T] = []
        # The result itself is not communicated.
        self.on_first(lambda: results.append(function()))
        return results[0] if results else function()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._hosts)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """Sum the values of all processes in place, in stream order. Does not synchronize the host."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: Tensor) -> Tensor:
        """Take the elementwise maximum of the values of all processes in place, in stream order."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def rows(self, samples: range) -> range:
        """Return this process's part of the samples of a step. The number of samples must be a multiple of `num_readers`."""
        share, reader = len(samples) // self.num_readers, self.rank // self.times_read
        return samples[reader * share : (reader + 1) * share]

    def own_rows(self, inputs: Tensor, targets: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Return this process's rows of (B, T) tensors. Pads B to a multiple of `num_readers` with ignored targets."""
        missing = -len(inputs) % self.num_readers
        batch = inputs, targets, *others
        if missing:
            inputs, _, *rest = (torch.cat([tensor, tensor[:1].expand(missing, -1)]) for tensor in batch)
            batch = inputs, F.pad(targets, (0, 0, 0, missing), value=IGNORED_TARGET), *rest
        own = self.rows(range(len(inputs)))
        return tuple(tensor[own.start : own.stop] for tensor in batch)

    def agreed(self, stop: StopRequest) -> "StopRequest | AgreedStop":
        """Return a request that becomes true in all processes after the same step, once `stop` is true in any."""
        return stop if self.size == 1 else AgreedStop(stop, self._hosts)
