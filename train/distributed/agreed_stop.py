"""A request to stop that takes effect after the same step in all processes."""

import signal

import torch
import torch.distributed as dist
from torch import Tensor

from ..signals import StopRequest


class AgreedStop:
    """The maximum of the `StopRequest` of all processes. All processes must evaluate it equally often.

    Each evaluation returns the result of the all-reduce that the previous evaluation started, so no step waits for it.
    """

    def __init__(self, own: StopRequest, group: dist.ProcessGroup | None) -> None:
        self.signal: signal.Signals | None = None
        self._own, self._group = own, group
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __bool__(self) -> bool:
        if self._pending is not None:
            work, number = self._pending
            work.wait()
            self.signal = signal.Signals(int(number)) if number else None
        self._pending = None
        if self.signal is None:
            number = torch.tensor(self._own.signal or 0)
            work = dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True)
            assert work is not None
            self._pending = work, number
        return self.signal is not None
