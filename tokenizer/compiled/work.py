"""Decide when compiled code runs and when plain Python does the same work.

Compiled code has a startup cost: a second to import Numba and load the code, or many seconds to compile it without a cache.
Plain Python does a kind of work until it has spent as much time on it, or is about to. A prompt or a small text therefore
never waits for a compiler.
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from . import jit, store

# Seconds to import Numba, and to load machine code afterwards, measured in 2026.
_IMPORT, _LOAD = 0.5, 0.1


class Work:
    """A kind of work: its compiled functions, the speed of plain Python, and the time to compile them.

    `functions` are compiled functions, or modules that contain only those. Thread-safe.
    """

    def __init__(self, what: str, functions: Sequence[Any], *, units_per_second: float, compile_seconds: float):
        self._what = what
        self._functions = functions
        self._units_per_second = units_per_second
        self._compile_seconds = compile_seconds
        self._seconds = 0.0
        self._is_worthwhile = False

    def is_compiled(self, units: float) -> bool:
        """Return whether compiled code should do this work on `units` more units; if so, it is ready, for good."""
        return self._is_worthwhile or self._check(units)

    def _check(self, units: float) -> bool:
        with jit.WORK_LOCK:
            self._seconds += units / self._units_per_second
            is_worthwhile = self._seconds > self._startup_seconds
        if is_worthwhile:
            jit.load(self._entries, f"the tokenizer's {self._what}", self._compile_seconds)
            self._is_worthwhile = True
        return is_worthwhile

    @cached_property
    def _entries(self) -> list[jit.Compiled]:
        modules = [each.__name__ for each in self._functions if isinstance(each, ModuleType)]
        return [each for each in jit.ALL if each.module in modules or each in self._functions]

    @cached_property
    def _startup_seconds(self) -> float:
        unloaded = [each.name for each in self._entries if each.entry is None]
        if not unloaded:
            return 0
        start = (0 if "numba" in sys.modules else _IMPORT) + _LOAD
        return start if all(map(store.is_cached, unloaded)) else start + self._compile_seconds
