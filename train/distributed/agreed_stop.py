"""A request to stop that all processes of a job heed after the same step."""

import signal

import torch
import torch.distributed as dist
from torch import Tensor

from ..signals import StopRequest


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
