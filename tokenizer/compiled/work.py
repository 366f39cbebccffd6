"""When compiled code runs, and when plain Python does the same instead: the one place where that is decided.

Machine code has a price: a second to import Numba and load it, many to compile it where none is kept. Until Python has worked
on one kind of work for as long as that, or is about to, it goes on: a prompt or a small text never waits for a compiler.
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from . import jit, store

# Seconds to import Numba, and to load machine code then, on a machine of 2026.
_IMPORT, _LOAD = 0.5, 0.1


class Work:
    """One kind of work: the functions that do it, how fast Python is at it, and how long they take to compile.

    `functions` are compiled ones, or modules with nothing but those. Any number of threads may ask.
    """

    def __init__(self, what: str, functions: Sequence[Any], *, units_per_second: float, compile_seconds: float):
        self._what = what
        self._functions = functions
        self._units_per_second = units_per_second
        self._compile_seconds = compile_seconds
        self._done = 0.0
        self._pays = False

    def is_compiled(self, units: float) -> bool:
        """Whether compiled code is to do this work on so many units more; it is ready then. Once it is, it stays so."""
        return self._pays or self._now_pays(units)

    def _now_pays(self, units: float) -> bool:
        with jit.WORK_LOCK:
            self._done += units / self._units_per_second
            pays = self._done > self._price
        if pays:
            jit.load(self._entries, f"the tokenizer's {self._what}", self._compile_seconds)
            self._pays = True
        return pays

    @cached_property
    def _entries(self) -> list[jit.Compiled]:
        modules = [each.__name__ for each in self._functions if isinstance(each, ModuleType)]
        return [each for each in jit.ALL if each.module in modules or each in self._functions]

    @cached_property
    def _price(self) -> float:
        waiting = [each.name for each in self._entries if each.entry is None]
        if not waiting:
            return 0
        start = (0 if "numba" in sys.modules else _IMPORT) + _LOAD
        return start if all(map(store.is_kept, waiting)) else start + self._compile_seconds
