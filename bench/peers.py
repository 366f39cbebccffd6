"""Optional packages with other implementations, imported by name, or the reason why a package is missing."""

import importlib
from functools import cache
from typing import Any

# Our variant with default choices; names of our other kernels start with this and a comma.
OWN = "tilewright"
# Installation of each package. The extra `bench` omits those that compile for long or bring their own compiler.
REMEDIES = {
    "liger_kernel": "pip install liger-kernel",
    "cut_cross_entropy": "pip install cut-cross-entropy",
    "quack": "pip install quack-kernels",
    "flash_attn": "pip install flash-attn",
    "flash_attn_interface": "build it in the folder hopper of flash-attn's repository",
}


class Unsupported(Exception):
    """A peer that is missing, lacks a shape, or is skipped; the message gives the reason."""


@cache
def _find(module: str, name: str | None) -> tuple[Any, str | None]:
    """Return (found, None), or (None, reason)."""
    package = module.split(".")[0]
    try:
        found = importlib.import_module(module)
        return (found if name is None else getattr(found, name)), None
    except ModuleNotFoundError as error:
        if error.name == package:
            return None, f"not installed: {REMEDIES.get(package, f'pip install {package}')}"
        return None, f"{type(error).__name__}: {error}"[:200]
    except Exception as error:  # a peer built for another PyTorch, or without a GPU, can fail in any way
        return None, f"{type(error).__name__}: {error}"[:200]


def find(module: str, name: str | None = None) -> Any:
    """Return a module of a peer, or its attribute `name`; raise `Unsupported` if it cannot be imported."""
    found, reason = _find(module, name)
    if reason is not None:
        # A new exception each time: the traceback of a kept one would keep the tensors of its frames.
        raise Unsupported(reason)
    return found
