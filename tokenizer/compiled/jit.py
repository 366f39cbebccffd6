"""Numba: how the hot loops of this room become machine code, and what is said while that happens.

A function is compiled at its first call, for the one signature that stands above it, and kept on disk where Numba finds a
folder it can write to. Code made for another CPU, Numba or source is made anew.
"""

import gc
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np


@contextmanager
def _no_garbage() -> Iterator[None]:
    # Numba's import makes some 10^5 objects that stay: to look through them for garbage takes a fifth of its time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


with _no_garbage():
    from numba import config, int64, njit, types, uint64
    from numba.core import event
    from numba.core.caching import FunctionCache
    from numba.core.runtime.nrt import rtsys

__all__ = [
    "BYTES",
    "INT32S",
    "INT64",
    "INT64S",
    "NUMBERS",
    "UINT8S",
    "UINT32S",
    "UINT64S",
    "check_array",
    "compiled",
    "helper",
    "int64",
    "tuple_of",
    "types",
    "uint64",
]

if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue]
    raise ImportError("NUMBA_DISABLE_JIT is set: the tokenizer needs compiled code, which handles memory as Python does not")

Function = TypeVar("Function", bound=Callable[..., Any])

# Reentrant, as whoever logs what is said here may encode text.
_LOCK = RLock()
_LOGGER = logging.getLogger(__name__)

if hasattr(os, "register_at_fork"):
    # A fork waits for the compiler: the child would have the locks of a thread that it does not have.
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)

# Contiguous arrays; the first two are not written to, and so may be read-only.
BYTES = types.Array(types.uint8, 1, "C", readonly=True)
NUMBERS = types.Array(types.int64, 1, "C", readonly=True)
UINT8S = types.Array(types.uint8, 1, "C")
INT32S = types.Array(types.int32, 1, "C")
INT64S = types.Array(types.int64, 1, "C")
UINT32S = types.Array(types.uint32, 1, "C")
UINT64S = types.Array(types.uint64, 1, "C")
INT64 = types.int64


def tuple_of(kind: type, *members: types.Type) -> Any:
    """Return Numba's type of a named tuple with members of these types."""
    return types.BaseTuple.from_types(members, kind)


def helper(function: Function) -> Function:
    """Let compiled functions call this one; it is compiled with them, and not meant to be called from Python.

    It cannot make arrays: in return, the arrays that it is given are not reference-counted, which takes longer than most calls.
    """
    options: dict[str, Any] = {"nogil": True, "_nrt": False}
    dispatcher: Any = njit(**options)(function)
    return dispatcher


def compiled(*arguments: Any) -> Callable[[Function], Function]:
    """Compile a function for these argument types at its first call; the machine code runs without the GIL.

    It may call helpers of its own file and of others of this folder. Its callers see to it that arguments have the types that
    stand here: arrays of another layout would be misread.
    """

    def decorate(function: Function) -> Function:
        entry: Any = None

        def call(*values: Any) -> Any:
            # Past Numba's dispatcher, which looks for the signature that fits, and takes as long for that as a short call.
            return (entry or load())(*values)

        def load() -> Any:
            nonlocal entry
            with _LOCK, event.install_listener("numba:compile", _Announcer()):
                if entry is None:
                    # Not when it is defined: most processes need few of all functions.
                    dispatcher: Any = njit(nogil=True)(function)
                    with suppress(RuntimeError):  # no folder to keep it in
                        dispatcher._cache = _RoomCache(function)
                    entry = dispatcher.compile(arguments)
            return entry

        call.__doc__, call.__name__, call.__wrapped__ = function.__doc__, function.__name__, function  # pyright: ignore
        return call  # pyright: ignore[reportReturnType]

    return decorate


def check_array(array: np.ndarray, kind: type, name: str) -> None:
    """Raise a `TypeError` for an array that compiled code would misread: it needs this dtype, one dimension, no gaps."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}: an array is needed")
    if array.dtype != kind or array.ndim != 1 or not array.flags.c_contiguous:
        found = f"{array.dtype} of shape {array.shape}"
        raise TypeError(f"{name} is an array of {found}: contiguous {np.dtype(kind)} of shape (n,) is needed")


class _RoomCache(FunctionCache):
    """Numba's cache, which knows only the time of a function's own file, made to know all sources of the tokenizer as well.

    Helpers and constants of other files are part of the machine code, too.
    """

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _sources())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # What Numba does here is to get ready to compile: three times as long as to load all that training needs.
            rtsys.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception:  # cut off, or foreign: whatever unpickling may raise
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk costs the next start its time, not this one its result
            super().save_overload(sig, data)


@cache
def _sources() -> str:
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
    ).hexdigest()


class _Announcer(event.Listener):
    def on_start(self, event: event.Event) -> None:
        _say_once()

    def on_end(self, event: event.Event) -> None:
        pass


_said = False


def _say_once() -> None:
    global _said
    if _said:
        return
    _said = True
    message = "compiling the tokenizer for this machine (once, some seconds)"
    _LOGGER.info(message)
    if sys.stderr.isatty():
        print(f"tilewright: {message}", file=sys.stderr)
