"""The processes of a job, and what they agree on."""

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
    """The processes of a job; by default this one alone, where nothing is communicated.

    All processes call the methods that communicate, in the same order. Processes that share layers (tp) are neighbours in rank,
    then those that share sequences (cp); all of these read the same rows, and are one of `num_readers`.
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
        """Processes that read the same rows."""
        self.num_readers = size // self.times_read
        self.num_replicas = size // layout.tp
        """Processes with gradients of their own for the same weights: the gradients are averaged over them."""
        # Of the hosts alone: what goes over it waits for no GPU, and no GPU for it.
        self._hosts = hosts

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

    def largest(self, value: Tensor) -> Tensor:
        """Take the elementwise maximum of the processes' values in place, as `sum` adds them up."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def rows(self, samples: range) -> range:
        """Return this process's part of the samples of a step, whose number has to divide by `num_readers`."""
        share, reader = len(samples) // self.num_readers, self.rank // self.times_read
        return samples[reader * share : (reader + 1) * share]

    def own_rows(self, inputs: Tensor, targets: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Return this process's rows of a batch, (B, T) each; where B does not divide, rows with ignored targets fill up."""
        missing = -len(inputs) % self.num_readers
        batch = inputs, targets, *others
        if missing:
            inputs, _, *rest = (torch.cat([tensor, tensor[:1].expand(missing, -1)]) for tensor in batch)
            batch = inputs, F.pad(targets, (0, 0, 0, missing), value=IGNORED_TARGET), *rest
        own = self.rows(range(len(inputs)))
        return tuple(tensor[own.start : own.stop] for tensor in batch)

    def agreed(self, stop: StopRequest) -> "StopRequest | AgreedStop":
        """Return what is true in all processes at the same time once `stop` is in any."""
        return stop if self.size == 1 else AgreedStop(stop, self._hosts)
