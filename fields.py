"""Values of a dataclass held against the types that its fields declare, since Python itself holds them against nothing."""

import functools
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError


def check_fields(record: Any, prefix: str = "") -> None:
    """Raise a `UserError` where a field of `record`, a dataclass, holds a value of another type, or NaN.

    An integer stands for a float, but no bool for an integer. Names in messages begin with `prefix`.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, hint):
            raise UserError(f"{prefix}{name} is {value!r}: it must be {_named(hint)}")


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) is int or (isinstance(value, float) and not math.isnan(value))
    if origin is Literal:
        # A bool equals an integer.
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        expected = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(expected) and all(map(_fits, value, expected))
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(_fits(name, key) and _fits(value[name], item) for name in value)
    return isinstance(value, hint)


def _named(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        choices = ", ".join(map(str, arguments))
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin in (Union, types.UnionType):
        return " or ".join(_named(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is ...:
            return f"a tuple, each item {_named(arguments[0])}"
        return f"a tuple of {len(arguments)}, each {_named(arguments[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "None"}
    return names.get(hint) or f"a {getattr(origin or hint, '__name__', hint)}"
