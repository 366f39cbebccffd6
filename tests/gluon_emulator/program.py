"""One program: warp partitions that run in turn, shared memory, barriers, and pending asynchronous operations."""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from .values import DType, Value

ORDERS = ("early", "late", "random")


class Deadlock(Exception):
    """No partition or program can continue."""


class Aborted(BaseException):
    """Another partition or program has failed."""


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data: np.ndarray, dtype: DType, unfenced: set[Any] | None = None) -> None:
        self.data, self.dtype = data, dtype
        self.unfenced: set[Any] = set() if unfenced is None else unfenced

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def index(self, i: Any) -> Any:
        part = self.data[int(i)]
        return part.item() if part.dtype == object and part.size == 1 else Shared(part, self.dtype, self.unfenced)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        part = (slice(None),) * dim + (slice(start, start + length),)
        return Shared(self.data[part], self.dtype, self.unfenced)

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.data.transpose(order), self.dtype, self.unfenced)

    def store(self, value: Value) -> None:
        self.data[...] = self.dtype.round(value.data)
        self.unfenced.add((threading.current_thread(), self.data.ctypes.data))

    def load(self, layout: Any = None) -> Value:
        return Value(self.data.copy())

    def read_by_hardware(self) -> np.ndarray:
        """Return the data for a product, after checking fences."""
        self.check_fences()
        return self.data

    def check_fences(self) -> None:
        """Fail unless a fence follows every generic write; call before a read through the asynchronous proxy."""
        assert not self.unfenced, "a generic write is read through the asynchronous proxy without fence_async_shared"


class Barrier:
    """An mbarrier: a phase ends after all arrivals and all expected bytes."""

    def __init__(self) -> None:
        self.count = self.left = self.phase = self.bytes = 0

    def index(self, i: Any) -> "Barrier":
        return self

    def end_of_phase(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.phase ^= 1
            self.left = self.count


class Product:
    """A pending product, which reads its operands in shared memory when it runs."""

    def __init__(self, compute: Callable[[], Value]) -> None:
        self.compute, self.value = compute, None

    def run(self) -> None:
        if self.value is None:
            self.value = self.compute()


class Program:
    """The shared state of a program's partitions: the schedule and the pending operations."""

    current: ClassVar["Program"]
    """The running program."""

    def __init__(self, order: str, seed: int, place: int, num_programs: int) -> None:
        self.order, self.random = order, random.Random(seed)
        self.place, self.num_programs = place, num_programs
        self.buffers: list[Shared] = []
        self.copies: list[Callable[[], None]] = []
        self.stores: dict[Any, list[Callable[[], None]]] = {}
        """Copies from shared to global memory, by partition."""
        self.products: dict[Any, list[Product]] = {}
        self.ready: dict[Any, Callable[[], bool]] = {}
        self.waits_for: dict[Any, str] = {}
        self.polling: set[Any] = set()
        self.turns: dict[Any, threading.Semaphore] = {}
        self.failure: BaseException | None = None

    def me(self) -> Any:
        return threading.current_thread()

    def _events(self) -> list[Callable[[], None]]:
        products = [next((p for p in queue if p.value is None), None) for queue in self.products.values()]
        return [*self.copies, *(p.run for p in products if p is not None)]

    def _happen(self, event: Callable[[], None]) -> None:
        if event in self.copies:
            self.copies.remove(event)
        event()

    def _next(self) -> Any:
        """Run events until a partition can continue and is chosen; return None if no partition is left."""
        while self.ready:
            able = [partition for partition, ready in self.ready.items() if ready()]
            events = self._events()
            # A polling partition does not delay events.
            if events and (self.polling.issuperset(able) or (self.order == "random" and self.random.random() < 0.5)):
                self._happen(self.random.choice(events))
            elif able:
                return self.random.choice(able)
            else:
                raise Deadlock("; ".join(sorted(f"{p.name} waits for {self.waits_for[p]}" for p in self.ready)))
        return None

    def give_way(self, ready: Callable[[], bool] = lambda: True, reason: str = "its turn", polling: bool = False) -> None:
        """Yield to the other partitions; return when this one is chosen and `ready` holds."""
        me = self.me()
        if me not in self.turns:
            # Outside warp_specialize there is only one thread.
            while not ready():
                self._happen(self._events()[0])
            return
        self.ready[me], self.waits_for[me] = ready, reason
        (self.polling.add if polling else self.polling.discard)(me)
        self._pass_on()
        self.turns[me].acquire()
        if self.failure is not None:
            raise Aborted

    def _pass_on(self) -> None:
        try:
            chosen = None if self.failure is not None else self._next()
        except BaseException as error:
            self.failure = error
            chosen = None
        if self.failure is not None:
            for turn in self.turns.values():
                turn.release()
        elif chosen is not None:
            del self.ready[chosen]
            self.turns[chosen].release()

    def run(self, partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
        """Run the partitions until all of them end."""

        def body(function: Callable[..., None], arguments: Sequence[Any]) -> None:
            self.turns[self.me()].acquire()
            try:
                if self.failure is None:
                    function(*arguments)
            except Aborted:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            del self.turns[self.me()]
            self._pass_on()

        threads = []
        for i, (function, arguments) in enumerate(partitions):
            thread = threading.Thread(target=body, args=(function, arguments), name=f"{function.__name__} {i}")
            threads.append(thread)
            self.turns[thread], self.ready[thread], self.waits_for[thread] = threading.Semaphore(0), lambda: True, "its start"
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
