"""Translate kernels to Python functions."""

import builtins
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .language import BUILTINS
from .values import Value


def _int_or_value(x: Any) -> Any:
    return int(x) if isinstance(x, Value) else x


def _range(*arguments: Any) -> range:
    return range(*map(_int_or_value, arguments))


@dataclass(frozen=True)
class Mutation:
    """A fault to inject into a kernel's function: replaces `old` with `new` in its source."""

    kernel: str
    function: str
    old: str
    new: str


class StaleMutation(Exception):
    """The source does not have the text that a mutation replaces, or has it more than once."""


def _code(source: Any, mutation: Mutation | None) -> types.CodeType:
    if mutation is None or source.__name__ != mutation.function:
        return source.__code__
    text = textwrap.dedent(inspect.getsource(source))
    text = text[text.index("def ") :]
    if text.count(mutation.old) != 1:
        raise StaleMutation(f"{mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.function}: expected once")
    # The scope has no names for annotations, so they must not be evaluated.
    module = compile("from __future__ import annotations\n" + text.replace(mutation.old, mutation.new), source.__name__, "exec")
    return next(c for c in module.co_consts if isinstance(c, types.CodeType) and c.co_name == source.__name__)


def translate(kernel: Any, known: dict[int, Any], mutation: Mutation | None, replaced: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a kernel as a Python function that uses the emulated builtins; translates the functions that it calls.

    `known` caches the translations by the id of the kernel.
    """
    if kernel.fn.__name__ in replaced:
        return replaced[kernel.fn.__name__]
    if id(kernel) in known:
        return known[id(kernel)]
    source = kernel.fn
    code = _code(source, mutation)
    scope: dict[str, Any] = {"__builtins__": {**vars(builtins), "range": _range}}
    known[id(kernel)] = types.FunctionType(code, scope, source.__name__, source.__defaults__)

    def of(value: Any) -> Any:
        if hasattr(value, "fn"):
            return translate(value, known, mutation, replaced)
        if isinstance(value, types.ModuleType):
            return types.SimpleNamespace(**{k: of(v) for k, v in vars(value).items() if hasattr(v, "fn") or _is_constant(v)})
        return value.value if _is_constant(value) else value

    for name in _names(code):
        if name in BUILTINS:
            scope[name] = BUILTINS[name]
        elif name in source.__globals__:
            scope[name] = of(source.__globals__[name])
    return known[id(kernel)]


def _is_constant(value: Any) -> bool:
    return type(value).__name__ == "constexpr"


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
