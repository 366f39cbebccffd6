"""Triton's interpreter, mended: it patches `triton.language` once a launch, and makes numbers of arrays as NumPy 2.4 wants."""

from functools import cache
from types import ModuleType

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor


@cache
def _languages(function) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_lang_once(function):
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch_lang(function)
    # A call inside a launch, which makes nothing of what it gets here: all is patched already.
    return None


def _patch_tensor_with_index(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def patch_once_a_launch() -> None:
    """What kernels compute stays the same; the more device functions they have, the more time is saved, up to a half."""
    interpreter._patch_lang = _patch_lang_once


def patch_index() -> None:
    """Triton 3.6 makes an int of an array of one element and one dimension, which NumPy refuses from 2.4 on."""
    interpreter._patch_lang_tensor = _patch_tensor_with_index
