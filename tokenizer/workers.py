"""Map a function over tasks with worker threads or processes: in order, and with bounded memory."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

from ..errors import UserError

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

# Below this size, one process finishes before a pool has started.
POOL_BYTES = 1 << 24

_work: Callable[[Any], Any]


def choose_workers(num_workers: int | None, num_bytes: int) -> int:
    """Return `num_workers`; for None, one per core, or one if the input is smaller than `POOL_BYTES`."""
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cores if num_bytes >= POOL_BYTES else 1
    if num_workers < 1:
        raise UserError(f"num_workers is {num_workers}: expected at least 1")
    return num_workers


def ordered_map(
    function: Callable[[Shared, Task], Result], shared: Shared, tasks: Iterable[Task], num_workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(shared, task)) in the order of the tasks; with one worker, run in this process.

    `function` must be defined at the top level of a module. `shared` is sent to each worker once. At most three tasks per
    worker are in flight. A worker that dies raises a `UserError`. An exception in a task is raised here.
    """
    if num_workers == 1:
        for task in tasks:
            yield task, function(shared, task)
        return
    # Spawn, because the threads of torch and a CUDA context do not survive a fork.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(function, shared)
    )
    running: deque[tuple[Task, Future[Result]]] = deque()
    try:
        for task in tasks:
            with _hidden_main():
                running.append((task, pool.submit(_run_task, task)))
            if len(running) >= 3 * num_workers:
                task, future = running.popleft()
                yield task, future.result()
        while running:
            task, future = running.popleft()
            yield task, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, probably because memory ran out: lower num_workers, or free memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_threads(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(task)) in the order of the tasks; with one worker, run in this thread.

    This thread iterates over the tasks. At most two tasks per worker are in flight. An exception in a task is raised here.
    """
    if num_workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    running: deque[tuple[Task, Future[Result]]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for task in tasks:
                running.append((task, pool.submit(function, task)))
                if len(running) > 2 * num_workers:
                    task, future = running.popleft()
                    yield task, future.result()
            while running:
                task, future = running.popleft()
                yield task, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _hidden_main() -> Iterator[None]:
    # A spawned process imports the caller's script again. That would import torch in every worker, and start workers without
    # end if a script lacks the `if __name__ == "__main__"` guard. No task needs the script.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _work
    _work = partial(function, shared)
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A worker of a killed parent would wait forever, because it holds both ends of the queue.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_task(task: Any) -> Any:
    return _work(task)
