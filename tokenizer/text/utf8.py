"""Make text valid UTF-8: invalid bytes become U+FFFD, exactly as in `bytes.decode(errors="replace")`."""

import re
from contextlib import suppress

import numpy as np

from ..compiled.intrinsics import ascii_only
from ..compiled.jit import BYTES, check_array, compiled

_SURROGATE = re.compile("[\ud800-\udfff]")


def encode_utf8(text: str) -> bytes:
    """Return a text in UTF-8. Each surrogate becomes U+FFFD, even in a pair, because a str must not contain surrogates."""
    try:
        # Call str.encode directly: a subclass of str may override the method and return another type.
        return str.encode(text)
    except TypeError:
        raise TypeError(f"text is of type {type(text).__name__}: expected str") from None
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", str(text)).encode()


def repair_utf8(data: np.ndarray) -> np.ndarray:
    """Return the uint8 text itself if it is valid UTF-8, else a repaired copy. Releases the GIL while it checks."""
    check_array(data, np.uint8, "a text")
    if _is_utf8.is_ready:
        if _is_utf8(data):
            return data
    else:
        with suppress(UnicodeDecodeError):
            data.tobytes().decode()
            return data
    return np.frombuffer(data.tobytes().decode(errors="replace").encode(), np.uint8)


@compiled(BYTES)
def _is_utf8(data):
    i = 0
    while i < len(data):
        if i + 64 <= len(data) and ascii_only(data, i):
            i += 64
            continue
        first = data[i]
        if first < 0x80:
            i += 1
            continue
        # The range of the second byte depends on the first: Unicode 16, table 3-7.
        low, high, size = 0x80, 0xBF, 2
        if 0xC2 <= first <= 0xDF:
            pass
        elif 0xE0 <= first <= 0xEF:
            size = 3
            if first == 0xE0:
                low = 0xA0
            elif first == 0xED:
                high = 0x9F
        elif 0xF0 <= first <= 0xF4:
            size = 4
            if first == 0xF0:
                low = 0x90
            elif first == 0xF4:
                high = 0x8F
        else:
            return False
        if i + size > len(data) or not low <= data[i + 1] <= high:
            return False
        for k in range(2, size):
            if data[i + k] & 0xC0 != 0x80:
                return False
        i += size
    return True
