"""Batches made ahead of time in a thread, so that no step waits for its data."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# One that waits to be taken, and one that is made meanwhile.
_DEPTH = 2
_CLOSING_SECONDS = 10.0


class Prefetcher(Iterator[tuple[Tensor, ...]]):
    """The tensors of `make(step)` for each step in range(first, last), on `device`, made in a thread up to two steps ahead.

    For a GPU they are pinned in the thread and copied without blocking: they may be used on the current stream at once. An
    error in `make` is raised where its step is taken. Close it, or leave it to the end of the process.
    """

    waited: float
    """Seconds that the consumer has waited for data."""

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], first: int, last: int, device: torch.device | str) -> None:
        self.waited = 0.0
        self._device = torch.device(device)
        self._left = last - first
        self._ready: queue.Queue[tuple[Tensor, ...] | BaseException] = queue.Queue(_DEPTH)
        stop = threading.Event()
        # A daemon, because the interpreter waits for other threads before it runs what would close this one. It knows nothing
        # of `self`, so that what nobody uses is closed.
        arguments = (make, range(first, last), self._gpu(), self._ready, stop)
        thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._close = weakref.finalize(self, _stop, thread, self._ready, stop)
        thread.start()

    def _gpu(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def __next__(self) -> tuple[Tensor, ...]:
        if self._left <= 0 or not self._close.alive:
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._left -= 1
        if self._device.type == "cpu":
            return item
        return tuple(tensor.to(self._device, non_blocking=True) for tensor in item)

    def close(self) -> None:
        """Stop making batches, once the one in the making is done; closing again does nothing."""
        self._close()


def _work(
    make: Callable[[int], tuple[Tensor, ...]], steps: range, gpu: int | None, ready: "queue.Queue", stop: threading.Event
) -> None:
    try:
        if gpu is not None:
            # A thread begins with the first GPU, and pinning would take memory there.
            torch.cuda.set_device(gpu)
        for step in steps:
            tensors = make(step)
            if stop.is_set():
                return
            ready.put(tensors if gpu is None else tuple(tensor.pin_memory() for tensor in tensors))
            if stop.is_set():
                return
    except BaseException as error:
        ready.put(error)


def _stop(thread: threading.Thread, ready: "queue.Queue", stop: threading.Event) -> None:
    stop.set()
    if thread is threading.current_thread():
        # The garbage collector runs wherever it likes, in the thread and within `ready` too.
        return
    # Makes room for what the thread may be about to put, which is one thing at most.
    while not ready.empty():
        ready.get_nowait()
    thread.join(_CLOSING_SECONDS)
