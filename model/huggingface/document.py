"""A JSON object that checks the type of each value as it is read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import require_file

_REQUIRED = object()


@dataclass(frozen=True)
class Document:
    """The `values` of a JSON object in the file `path`. An invalid value is a `UserError` that names the file and the value.

    A default replaces an absent or null value. Without a default the value is required.
    """

    path: Path
    values: Mapping[str, Any]

    def error(self, name: str, allowed: str) -> UserError:
        """Return the error for the value of `name`; `allowed` describes valid values."""
        return UserError(f"{self.path} has {name} {json.dumps(self.values.get(name))}: expected {allowed}")

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return an int, 1 or more."""
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not int or value < 1:
            raise self.error(name, "a whole number, at least 1")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a finite float above 0."""
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(name, "a finite number above 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return a bool."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def object(self, name: str) -> "Document":
        """Return an object; absent and null become an empty object."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "null or an object")
        return Document(self.path, value or {})

    def only(self, name: str, *allowed: Any) -> None:
        """Raise unless the value is one of `allowed`, the values that our blocks support, or null."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            only = " or ".join(json.dumps(each) for each in allowed) or "null"
            raise UserError(f"{self.path} has {name} {json.dumps(value)}, which is not supported: expected {only}")


def read_document(path: Path, what: str) -> Document:
    """Return the JSON object in a file; errors call the file `what`."""
    try:
        values = json.loads(require_file(path, what).read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}: expected a JSON object")
    return Document(path, values)
