"""Patches for Triton's interpreter: patch `triton.language` once per launch, and support NumPy 2.4."""

from dataclasses import replace
from functools import cache
from types import ModuleType

import triton.language as tl
from triton.runtime import interpreter

_find_numpy_dtype = cache(interpreter._get_np_dtype)
_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor


@cache
def _languages(function) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_lang_once(function):
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch_lang(function)
    # A nested call within a launch: the language is patched already, and the caller ignores the result.
    return None


def _patch_tensor_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def patch_once_a_launch() -> None:
    """Patch once per launch, not per device function; results are the same, and kernels run in as little as half the time."""
    interpreter._patch_lang = _patch_lang_once


def patch_index() -> None:
    """Convert one-element arrays to int explicitly: Triton 3.6 relies on a conversion that NumPy 2.4 removed."""
    interpreter._patch_lang_tensor = _patch_tensor_with_index


def skip_overflow_checks() -> None:
    """Do not check the sum of two integers in int64: without `debug` the interpreter drops the result.

    Half of the interpreter's time goes into these checks.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _numpy_dtype(dtype):
    # Pointers are not hashable. The type of a block has the NumPy type of its elements.
    return interpreter.np.dtype("uint64") if dtype.scalar.is_ptr() else _find_numpy_dtype(dtype.scalar)


def cache_numpy_dtypes() -> None:
    """Look up NumPy types in a cache; the interpreter builds a table of all types at each look-up."""
    interpreter._get_np_dtype = _numpy_dtype


def patch_interpreter() -> None:
    """Apply all patches of this module."""
    for patch in (patch_once_a_launch, patch_index, skip_overflow_checks, cache_numpy_dtypes):
        patch()
