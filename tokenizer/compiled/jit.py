"""Compile the hot loops of the tokenizer with Numba, and report it.

A function is compiled on demand, for the one signature in its decorator, and cached on disk: see `store.py`. Numba is
imported only then, because the import takes longer than encoding a prompt; until then, types are descriptions. `work.py`
decides when plain Python does the work instead.
"""

import gc
import hashlib
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from threading import Lock, RLock
from types import FunctionType
from typing import Any, TypeVar

import numpy as np

from . import store

Function = TypeVar("Function", bound=Callable[..., Any])

# Reentrant, because a log handler may encode text while a compilation is reported.
LOCK = RLock()
_LOGGER = logging.getLogger(__name__)

# Guards the counters of `work.py`. Held only briefly, unlike LOCK, for which a small text would wait.
WORK_LOCK = Lock()

if hasattr(os, "register_at_fork"):
    # Fork only while no thread compiles: the child would inherit locks without the thread that holds them. The locks are
    # acquired in the order of a thread that compiles and encodes log messages.
    os.register_at_fork(
        before=lambda: (LOCK.acquire(), WORK_LOCK.acquire()),
        after_in_parent=lambda: (WORK_LOCK.release(), LOCK.release()),
        after_in_child=lambda: (WORK_LOCK.release(), LOCK.release()),
    )

# In compiled functions, Numba replaces these by its own types.
int64, uint64 = np.int64, np.uint64


@dataclass(frozen=True)
class ArrayType:
    """A contiguous array. A read-only type accepts read-only arrays and must not be written to."""

    dtype: str
    num_dims: int = 1
    readonly: bool = False

    def of_numba(self, types: Any) -> Any:
        """Return the type of Numba."""
        return types.Array(getattr(types, self.dtype), self.num_dims, "C", readonly=self.readonly)


@dataclass(frozen=True)
class IntegerType:
    """A 64-bit integer."""

    def of_numba(self, types: Any) -> Any:
        """Return the type of Numba."""
        return types.int64


@dataclass(frozen=True)
class TupleType:
    """A tuple of such values; a named tuple if `kind` is a class."""

    members: tuple["Type", ...]
    kind: type = tuple

    def of_numba(self, types: Any) -> Any:
        """Return the type of Numba."""
        return types.BaseTuple.from_types([member.of_numba(types) for member in self.members], self._named)

    def plain(self) -> "TupleType":
        """Return the type of an unnamed tuple: calls from Python take half as long with it."""
        return TupleType(self.members)

    @property
    def _named(self) -> type | None:
        return None if self.kind is tuple else self.kind


Type = ArrayType | IntegerType | TupleType

BYTES = ArrayType("uint8", readonly=True)
NUMBERS = ArrayType("int64", readonly=True)
UINT8S = ArrayType("uint8")
INT32S = ArrayType("int32")
INT64S = ArrayType("int64")
UINT32S = ArrayType("uint32")
UINT64S = ArrayType("uint64")
INT64 = IntegerType()


def tuple_of(kind: type, *members: Type) -> TupleType:
    """Return the type of a named tuple with members of these types."""
    return TupleType(members, kind)


class _Callee:
    """A function that compiled functions call; converted for Numba when the first of them is compiled."""

    def __init__(self, make: Callable[[], Any]):
        self.of_numba = cache(make)


def helper(function: Function) -> Function:
    """Make a function callable from compiled functions; it is compiled with them, and cannot be called from Python.

    It must not create arrays. In return, its array arguments are not reference-counted, which would take longer than most
    calls.
    """
    options = {"nogil": True, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    callee: Any = _Callee(lambda: _numba().njit(**options)(_with_callees(function)))
    return callee


def intrinsic(name: str) -> Any:
    """Make an intrinsic of `llvm.py` callable from compiled functions."""
    return _Callee(lambda: getattr(import_module(".llvm", __package__), name))


class Compiled:
    """A function that is compiled, or loaded from the cache, on its first call."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Type, ...], releases_gil: bool = True):
        self.__doc__, self.__name__, self.__wrapped__ = function.__doc__, function.__name__, function
        self.module = function.__module__
        self._arguments, self._releases_gil = arguments, releases_gil
        self.entry: Any = None

    @property
    def name(self) -> str:
        """The name of its file in the cache."""
        return f"{self.module.rpartition('.')[2]}.{self.__name__}"

    @property
    def is_ready(self) -> bool:
        """Whether it is loaded. Callers with a plain alternative of nearly the same speed do not compile for it alone."""
        return self.entry is not None

    def __call__(self, *values: Any) -> Any:
        """Call the compiled function."""
        # Bypass Numba's dispatcher, whose search for the signature takes as long as a short call.
        return (self.entry or self._loaded())(*values)

    def _loaded(self) -> Any:
        load([self])
        return self.entry

    def make(self, report: "_Report") -> None:
        """Load the function, or compile it and store the code, which is reported."""
        with _gc_disabled():
            numba = _numba()
            dispatcher: Any = numba.njit(nogil=self._releases_gil, no_cfunc_wrapper=True)(_with_callees(self.__wrapped__))
            dispatcher._cache = _NumbaCache(self.name, report)
            self.entry = dispatcher.compile(tuple(each.of_numba(numba.core.types) for each in self._arguments))


ALL: list[Compiled] = []


def compiled(*arguments: Type, releases_gil: bool = True) -> Callable[[Callable[..., Any]], Compiled]:
    """Compile a function on demand for these argument types; by default the machine code runs without the GIL.

    It may call helpers from any file. Callers must pass arguments of exactly these types: an array of another layout would be
    misread.
    """

    def decorate(function: Callable[..., Any]) -> Compiled:
        ALL.append(Compiled(function, arguments, releases_gil))
        return ALL[-1]

    return decorate


def load(functions: Sequence[Compiled], what: str = "the tokenizer", seconds: float | None = None) -> int:
    """Load functions, compiling and reporting those that are not cached; return how many were compiled.

    The report names `what` and the expected `seconds`.
    """
    with LOCK:
        report = _Report(what, seconds)
        for function in functions:
            if function.entry is None:
                function.make(report)
        report.end()
    return report.num_compiled


def check_array(array: np.ndarray, kind: type, name: str) -> None:
    """Raise a `TypeError` unless an array has dtype `kind`, one dimension and contiguous elements, as compiled code expects."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}: expected an array")
    if array.dtype != kind or array.ndim != 1 or not array.flags.c_contiguous:
        found = f"{array.dtype} of shape {array.shape}"
        raise TypeError(f"{name} is an array of {found}: expected contiguous {np.dtype(kind)} of shape (n,)")


@contextmanager
def _gc_disabled() -> Iterator[None]:
    # Numba creates some 10^5 permanent objects; scanning them for garbage takes a fifth of its time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def _numba() -> Any:
    import numba
    from numba.core import config

    if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
        raise ImportError("NUMBA_DISABLE_JIT is set: unset it, because the tokenizer's loops run only as compiled code")
    return numba


def _with_callees(function: Callable[..., Any]) -> Any:
    """Return a copy of a function whose globals hold Numba's versions of its callees."""
    assert isinstance(function, FunctionType)
    names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    found = {name: value.of_numba() for name, value in names.items() if isinstance(value, _Callee)}
    scope = {**function.__globals__, **found}
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return made


class _NumbaCache:
    """The cache interface that Numba expects: the machine code of one function in `store.py`."""

    def __init__(self, name: str, report: "_Report"):
        self._name = name
        self._report = report

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        from numba.core.compiler import CompileResult
        from numba.core.runtime.nrt import rtsys

        cpu = _cpu(target_context.codegen())
        code = store.load(self._name, cpu)
        if code is not None:
            try:
                # Numba's own cache initializes the compiler here, which takes three times as long as loading all training
                # code.
                rtsys.initialize(target_context)
                return CompileResult._rebuild(target_context, *pickle.loads(code))
            except Exception as error:
                _LOGGER.warning("cannot load the machine code of %s, compiling it again: %r", self._name, error)
        self._report.begin()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        from numba.core.serialize import dumps

        store.save(self._name, _cpu(data.codegen), dumps(data._reduce()))


def _cpu(codegen: Any) -> str:
    return hashlib.sha256(repr(codegen.magic_tuple()).encode()).hexdigest()[:16]


class _Report:
    """The messages about compiling, on a terminal and in the log."""

    def __init__(self, what: str, seconds: float | None):
        self._what = what
        self._expected = f", about {seconds:.0f} s" if seconds else ""
        self._start: float | None = None
        self.num_compiled = 0

    def begin(self) -> None:
        self.num_compiled += 1
        if self._start is None:
            self._start = time.perf_counter()
            _log(f"compiling {self._what} for this machine (once{self._expected})")

    def end(self) -> None:
        if self._start is not None:
            folder = store.writable_folder()
            where = f"stored in {folder}" if folder else "not stored, because no cache folder is writable: set NUMBA_CACHE_DIR"
            _log(f"compiled in {time.perf_counter() - self._start:.1f} s, {where}")


def _log(message: str) -> None:
    _LOGGER.info(message)
    if sys.stderr.isatty():
        print(f"tilewright: {message}", file=sys.stderr)
