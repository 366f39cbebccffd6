"""Other people's kernels: optional packages, each found by name, or with the reason why it is not there."""

import importlib
from functools import cache
from typing import Any

# Our own variant as it ships; other forms of it have names that begin with it and a comma.
OWN = "tilewright"
# How to get each package. Those that the extra `bench` leaves out compile for long, or bring a compiler of their own.
REMEDIES = {
    "liger_kernel": "pip install liger-kernel",
    "cut_cross_entropy": "pip install cut-cross-entropy",
    "quack": "pip install quack-kernels",
    "flash_attn": "pip install flash-attn",
    "flash_attn_interface": "build it in the folder hopper of flash-attn's repository",
}


class Unsupported(Exception):
    """A peer that is not here, or a shape that it does not have, or that is left out; the message says why."""


@cache
def _find(module: str, name: str | None) -> Any:
    package = module.split(".")[0]
    try:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name)
    except ModuleNotFoundError as error:
        if error.name == package:
            return Unsupported(f"not installed: {REMEDIES.get(package, f'pip install {package}')}")
        return Unsupported(f"{type(error).__name__}: {error}"[:200])
    except Exception as error:  # compiled for another PyTorch, or without a GPU, a peer fails in ways of its own
        return Unsupported(f"{type(error).__name__}: {error}"[:200])


def find(module: str, name: str | None = None) -> Any:
    """Return a module of a peer, or what it calls `name`; `Unsupported` where it cannot be imported."""
    found = _find(module, name)
    if isinstance(found, Unsupported):
        raise found
    return found
