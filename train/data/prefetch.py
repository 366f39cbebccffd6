"""Prefetching of batches in a thread."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# One batch is ready while the thread prepares the next.
_DEPTH = 2
_CLOSING_SECONDS = 10.0


class Prefetcher(Iterator[tuple[Tensor, ...]]):
    """Yields the tensors of `make(step)` on `device` for each step in range(first, last). A thread runs up to two steps ahead.

    For a GPU, the thread pins the tensors, and the copy to the device is asynchronous on the current stream. An error in `make`
    is raised when the consumer takes that step. A `Prefetcher` that is not closed ends with the process.
    """

    waited: float
    """Seconds that the consumer has waited for batches."""

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], first: int, last: int, device: torch.device | str) -> None:
        self.waited = 0.0
        self._device = torch.device(device)
        self._left = last - first
        self._ready: queue.Queue[tuple[Tensor, ...] | BaseException] = queue.Queue(_DEPTH)
        stop = threading.Event()
        # A daemon, because at exit the interpreter joins other threads before it runs finalizers. The thread holds no reference
        # to `self`, so that an unused prefetcher is collected and closed.
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
        """Stop the thread after its current batch. A second call does nothing."""
        self._close()


def _work(
    make: Callable[[int], tuple[Tensor, ...]], steps: range, gpu: int | None, ready: "queue.Queue", stop: threading.Event
) -> None:
    try:
        if gpu is not None:
            # A new thread uses the first GPU, and pinning would allocate memory there.
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
        # The garbage collector may run the finalizer in the prefetch thread, even inside a method of `ready`.
        return
    # Unblocks the thread, which may be waiting to put one more item.
    while not ready.empty():
        ready.get_nowait()
    thread.join(_CLOSING_SECONDS)
