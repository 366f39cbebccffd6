"""A JSON object from outside, whose values are checked as they are read."""

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
    """The `values` of an object in the file `path`. A value that cannot be used is a `UserError` that names both.

    A default stands for a value that is absent or null; without one the value must be there.
    """

    path: Path
    values: Mapping[str, Any]

    def error(self, name: str, allowed: str) -> UserError:
        """Return the error for the value of a name, of which `allowed` says what it must be."""
        return UserError(f"{self.path} has {name} {json.dumps(self.values.get(name))}: it must be {allowed}")

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
        """Return an object; one that is absent or null is empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "null or an object")
        return Document(self.path, value or {})

    def only(self, name: str, *allowed: Any) -> None:
        """Raise where our blocks lack what the value asks for; null stands for the default of the format."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            only = " or ".join(json.dumps(each) for each in allowed) or "null"
            raise UserError(f"{self.path} has {name} {json.dumps(value)}, which our blocks lack: only {only} can be read")


def read_document(path: Path, what: str) -> Document:
    """Return the JSON object in a file; `what` says in errors what the file is."""
    try:
        values = json.loads(require_file(path, what).read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}: it must be a JSON object")
    return Document(path, values)
