"""Lazy public names of a package (PEP 562): `from tilewright.train import TrainConfig` imports no torch."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attach_stub(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports each public name at its first use.

    The stub `__init__.pyi` beside `file`, which type checkers read, lists the names as `from .module import name as name`.
    No public name may equal the name of a submodule: importing the submodule would replace the public name.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    modules = {name.name: f".{node.module}" for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names}

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name], package), name)
        # The next access finds the name without this function.
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__, sorted(modules)
