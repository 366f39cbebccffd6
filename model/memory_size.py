"""Sizes of memory with their units: 80GB is 80e9 bytes, 80GiB is 80 x 2^30."""

import re

from ..errors import UserError

GB, GIB = 10**9, 2**30
_MOST_BYTES = 10**18
_UNITS = {"MB": 10**6, "GB": GB, "TB": 10**12, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as `80GB` (80e9) or `80GiB` (80 x 2^30); the unit is required."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"memory is {text!r}: expected a number and one of {', '.join(_UNITS)}, such as 80GB or 80GiB")
    size = float(match[1]) * _UNITS[match[2]]
    if not 1 <= round(min(size, 2 * _MOST_BYTES)) <= _MOST_BYTES:
        raise UserError(f"memory is {text!r}: expected a size from 1 byte to {_MOST_BYTES / GB:,.0f} GB")
    return round(size)
