"""Check the values of a dataclass against the declared types of its fields, which Python does not do."""

import functools
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError


def check_fields(record: Any, prefix: str = "") -> None:
    """Raise a `UserError` if a field of the dataclass `record` holds a value of the wrong type, or NaN.

    A float field accepts an integer; an integer field rejects a bool. Field names in messages start with `prefix`.
    """
    for name, hint in _hints(type(record)).items():
        value = getattr(record, name)
        if not _matches(value, hint):
            raise UserError(f"{prefix}{name} is {value!r}: it must be {_describe(hint)}")


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) is int or (isinstance(value, float) and not math.isnan(value))
    if origin is Literal:
        # True == 1, so compare the types as well.
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        expected = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(expected) and all(map(_matches, value, expected))
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(_matches(name, key) and _matches(value[name], item) for name in value)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        choices = ", ".join(map(str, arguments))
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is ...:
            return f"a tuple, each item {_describe(arguments[0])}"
        return f"a tuple of {len(arguments)}, each {_describe(arguments[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "None"}
    return names.get(hint) or f"a {getattr(origin or hint, '__name__', hint)}"
