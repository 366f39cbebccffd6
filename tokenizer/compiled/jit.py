"""Numba: how the hot loops of this room become machine code, and what is said while that happens.

A function is compiled when it is needed, for the one signature that stands above it, and kept on disk: see `store.py`.
Numba itself is imported only then, because that takes longer than to encode a prompt; until then its types are descriptions.
`work.py` says when plain Python does the work instead.
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

# Reentrant, as whoever logs what is said here may encode text.
LOCK = RLock()
_LOGGER = logging.getLogger(__name__)

# Of all that `work.py` counts, held for no time; not the compiler's, for which a small text would wait.
WORK_LOCK = Lock()

if hasattr(os, "register_at_fork"):
    # A fork waits for the compiler: the child would have the locks of a thread that it does not have. The order is that of a
    # thread that compiles and encodes what it logs.
    os.register_at_fork(
        before=lambda: (LOCK.acquire(), WORK_LOCK.acquire()),
        after_in_parent=lambda: (WORK_LOCK.release(), LOCK.release()),
        after_in_child=lambda: (WORK_LOCK.release(), LOCK.release()),
    )

# In a compiled function these are Numba's.
int64, uint64 = np.int64, np.uint64


@dataclass(frozen=True)
class ArrayType:
    """A contiguous array; one that is read-only is not written to, and may be such."""

    dtype: str
    num_dims: int = 1
    readonly: bool = False

    def of_numba(self, types: Any) -> Any:
        """Return Numba's type."""
        return types.Array(getattr(types, self.dtype), self.num_dims, "C", readonly=self.readonly)


@dataclass(frozen=True)
class IntegerType:
    """An integer of 64 bits."""

    def of_numba(self, types: Any) -> Any:
        """Return Numba's type."""
        return types.int64


@dataclass(frozen=True)
class TupleType:
    """A tuple of such values, a named one where a class is given."""

    members: tuple["Type", ...]
    kind: type = tuple

    def of_numba(self, types: Any) -> Any:
        """Return Numba's type."""
        return types.BaseTuple.from_types([member.of_numba(types) for member in self.members], self._named)

    def plain(self) -> "TupleType":
        """Return the type of a tuple without names: calls from Python take half as long with it."""
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
    """What compiled functions call; it becomes Numba's when the first of them is compiled."""

    def __init__(self, make: Callable[[], Any]):
        self.of_numba = cache(make)


def helper(function: Function) -> Function:
    """Let compiled functions call this one; it is compiled with them, and not meant to be called from Python.

    It cannot make arrays: in return, the arrays that it is given are not reference-counted, which takes longer than most calls.
    """
    options = {"nogil": True, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    callee: Any = _Callee(lambda: _numba().njit(**options)(_with_callees(function)))
    return callee


def intrinsic(name: str) -> Any:
    """Let compiled functions call an intrinsic of `llvm.py`."""
    return _Callee(lambda: getattr(import_module(".llvm", __package__), name))


class Compiled:
    """A function of machine code, compiled or loaded at its first call."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Type, ...], releases_gil: bool = True):
        self.__doc__, self.__name__, self.__wrapped__ = function.__doc__, function.__name__, function
        self.module = function.__module__
        self._arguments, self._releases_gil = arguments, releases_gil
        self.entry: Any = None

    @property
    def name(self) -> str:
        """The name that its machine code is kept under."""
        return f"{self.module.rpartition('.')[2]}.{self.__name__}"

    @property
    def is_ready(self) -> bool:
        """Whether it runs at once; where plain Python is nearly as fast, nobody compiles for it alone."""
        return self.entry is not None

    def __call__(self, *values: Any) -> Any:
        """Run it."""
        # Past Numba's dispatcher, which looks for the signature that fits, and takes as long for that as a short call.
        return (self.entry or self._loaded())(*values)

    def _loaded(self) -> Any:
        load([self])
        return self.entry

    def make(self, announcement: "_Announcement") -> None:
        """Load it, or compile and keep it, which is announced."""
        with _no_garbage():
            numba = _numba()
            dispatcher: Any = numba.njit(nogil=self._releases_gil, no_cfunc_wrapper=True)(_with_callees(self.__wrapped__))
            dispatcher._cache = _Kept(self.name, announcement)
            self.entry = dispatcher.compile(tuple(each.of_numba(numba.core.types) for each in self._arguments))


ALL: list[Compiled] = []


def compiled(*arguments: Type, releases_gil: bool = True) -> Callable[[Callable[..., Any]], Compiled]:
    """Compile a function for these argument types when it is needed; by default the machine code runs without the GIL.

    It may call helpers of its own file and of others of this folder. Its callers see to it that arguments have the types that
    stand here: arrays of another layout would be misread.
    """

    def decorate(function: Callable[..., Any]) -> Compiled:
        ALL.append(Compiled(function, arguments, releases_gil))
        return ALL[-1]

    return decorate


def load(functions: Sequence[Compiled], what: str = "the tokenizer", seconds: float | None = None) -> int:
    """Load functions, or compile those that are not kept, which is said; return how many were compiled.

    `what` is being compiled, in about as many `seconds`.
    """
    with LOCK:
        announcement = _Announcement(what, seconds)
        for function in functions:
            if function.entry is None:
                function.make(announcement)
        announcement.end()
    return announcement.num_compiled


def check_array(array: np.ndarray, kind: type, name: str) -> None:
    """Raise a `TypeError` for an array that compiled code would misread: it needs this dtype, one dimension, no gaps."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}: an array is needed")
    if array.dtype != kind or array.ndim != 1 or not array.flags.c_contiguous:
        found = f"{array.dtype} of shape {array.shape}"
        raise TypeError(f"{name} is an array of {found}: contiguous {np.dtype(kind)} of shape (n,) is needed")


@contextmanager
def _no_garbage() -> Iterator[None]:
    # Numba makes some 10^5 objects that stay: to look through them for garbage takes a fifth of its time.
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
        raise ImportError(
            "NUMBA_DISABLE_JIT is set: the tokenizer needs compiled code, which handles memory as Python does not"
        )
    return numba


def _with_callees(function: Callable[..., Any]) -> Any:
    """Return a function that finds Numba's form of what it calls among its globals."""
    assert isinstance(function, FunctionType)
    names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    found = {name: value.of_numba() for name, value in names.items() if isinstance(value, _Callee)}
    scope = {**function.__globals__, **found}
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return made


class _Kept:
    """What Numba takes for a cache: the machine code of one function in `store.py`."""

    def __init__(self, name: str, announcement: "_Announcement"):
        self._name = name
        self._announcement = announcement

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        from numba.core.compiler import CompileResult
        from numba.core.runtime.nrt import rtsys

        cpu = _cpu(target_context.codegen())
        code = store.load(self._name, cpu)
        if code is not None:
            try:
                # Numba's own cache gets ready to compile here: three times as long as to load all that training needs.
                rtsys.initialize(target_context)
                return CompileResult._rebuild(target_context, *pickle.loads(code))
            except Exception as error:
                _LOGGER.warning("machine code of %s cannot be loaded, and is made anew: %r", self._name, error)
        self._announcement.begin()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        from numba.core.serialize import dumps

        store.save(self._name, _cpu(data.codegen), dumps(data._reduce()))


def _cpu(codegen: Any) -> str:
    return hashlib.sha256(repr(codegen.magic_tuple()).encode()).hexdigest()[:16]


class _Announcement:
    """What is said when something is compiled, on a terminal and in the log."""

    def __init__(self, what: str, seconds: float | None):
        self._what = what
        self._expected = f", about {seconds:.0f} s" if seconds else ""
        self._start: float | None = None
        self.num_compiled = 0

    def begin(self) -> None:
        self.num_compiled += 1
        if self._start is None:
            self._start = time.perf_counter()
            _say(f"compiling {self._what} for this machine (once{self._expected})")

    def end(self) -> None:
        if self._start is not None:
            folder = store.place()
            where = f"kept in {folder}" if folder else "not kept, as no folder can be written to: set NUMBA_CACHE_DIR"
            _say(f"compiled in {time.perf_counter() - self._start:.1f} s, {where}")


def _say(message: str) -> None:
    _LOGGER.info(message)
    if sys.stderr.isatty():
        print(f"tilewright: {message}", file=sys.stderr)
