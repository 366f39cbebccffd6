"""The programs of a launch: a few at a time, started in order, which yield before they write or poll global memory."""

import random
import threading
from collections.abc import Callable
from typing import ClassVar

from .program import Aborted, Deadlock, Program

MOST_POLLS = 10_000


class Grid:
    """Concurrent programs, of which one runs at a time. The order `early` prefers the first, `late` the last."""

    current: ClassVar["Grid"]
    """The running grid."""

    def __init__(self, order: str, seed: int, num_programs: int, at_once: int) -> None:
        self.order, self.seed, self.random = order, seed, random.Random(seed)
        self.num_programs, self.at_once = num_programs, at_once
        self.turns: dict[Program, threading.Semaphore] = {}
        self.begun = self.polls = 0
        self.failure: BaseException | None = None
        self.over = threading.Event()

    def run(self, body: Callable[[], None]) -> None:
        """Run `body` as each program."""

        def life(program: Program) -> None:
            self.turns[program].acquire()
            Program.current = program
            try:
                if self.failure is None:
                    body()
                    assert not program.copies, "a program ends before its copies"
            except BaseException as error:
                self._fail(error)
            del self.turns[program]
            begin()
            if self.failure is None and self.turns:
                self._choose()
            elif not self.turns:
                self.over.set()

        def begin() -> None:
            if self.begun == self.num_programs or self.failure is not None:
                return
            program = Program(self.order, self.seed + self.begun, self.begun, self.num_programs)
            self.begun += 1
            self.turns[program] = threading.Semaphore(0)
            threading.Thread(target=life, args=(program,), daemon=True).start()

        Grid.current = self
        for _ in range(min(self.at_once, self.num_programs)):
            begin()
        if self.turns:
            self._choose()
            self.over.wait()
        if self.failure is not None:
            raise self.failure

    def _choose(self) -> None:
        programs = list(self.turns)
        # Sometimes choose any program, so that none starves.
        fair = self.order == "random" or self.random.random() < 0.1
        self.turns[self.random.choice(programs) if fair else programs[0 if self.order == "early" else -1]].release()

    def _fail(self, error: BaseException) -> None:
        if self.failure is None and not isinstance(error, Aborted):
            self.failure = error
            for program, turn in list(self.turns.items()):
                program.failure = program.failure or error
                turn.release()

    def before_write(self) -> None:
        """Yield to other programs before a write to global memory."""
        self.polls = 0
        self._give_way()

    def poll(self) -> None:
        """Yield to other programs before a read of a counter in global memory that they may change."""
        self.polls += 1
        if self.polls > MOST_POLLS:
            raise Deadlock("programs wait for one another, or for one that starts later")
        self._give_way()

    def _give_way(self) -> None:
        me = Program.current
        self._choose()
        self.turns[me].acquire()
        Program.current = me
        if self.failure is not None:
            raise Aborted
