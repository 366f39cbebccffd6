"""A file of pretoken counts: learn vocabularies from it without reading the text again.

    line 1      a JSON object: format, version, pattern, special_tokens, text_bytes, num_pretokens, num_bytes, and the sha256 of
                its other entries, as compact JSON in this order, followed by everything after the line
    then        the ends of the pretokens, int64; their counts, int64; their bytes; all little-endian

Equal counts give identical files.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...files import atomic_file, require_file
from ..text.patterns import check_special_tokens, resolve_pattern
from .pretoken_counts import PretokenCounts

_FORMAT = "tilewright-counts"
_VERSION = 1
_SIZES = ("text_bytes", "num_pretokens", "num_bytes")
# Limit for the first line: enough for thousands of special tokens.
_LONGEST_HEADER = 1 << 22


@dataclass(frozen=True)
class CountedText:
    """Counts, and what determined them: the pattern (name or expression), the special tokens, the size of the text."""

    counts: PretokenCounts
    pattern: str
    special_tokens: tuple[str, ...]
    text_bytes: int


def save_counts(path: Path | str, text: CountedText) -> None:
    """Write the counts to `path`, atomically."""
    counts = text.counts
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "pattern": text.pattern,
        "special_tokens": list(text.special_tokens),
        "text_bytes": text.text_bytes,
        "num_pretokens": len(counts),
        "num_bytes": len(counts.data),
    }
    parts = [counts.ends.astype("<i8", copy=False).data, counts.counts.astype("<i8", copy=False).data, counts.data.data]
    with atomic_file(path) as file:
        file.write(json.dumps(header | {"sha256": _digest(header, parts)}).encode() + b"\n")
        for part in parts:
            file.write(part)


def load_counts(path: Path | str) -> CountedText:
    """Read a file of `save_counts`; a missing, unsupported, truncated or modified file raises a `UserError`."""
    with require_file(path, "counts file", "make one with save_counts").open("rb") as file:
        try:
            header = json.loads(file.readline(_LONGEST_HEADER))
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise UserError(f"{path} is not a counts file: tokenizer training writes one with save_counts")
        if header.get("version") != _VERSION:
            raise UserError(f"counts file {path} has version {header.get('version')!r}: expected {_VERSION}")
        body = np.frombuffer(file.read(), np.uint8)
    expected = header.pop("sha256", None)
    if expected != _digest(header, [body.data]):
        raise UserError(f"counts file {path} is truncated, or was modified after it was written")
    try:
        return _parse(header, body)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"counts file {path} is malformed: {error}") from None


def _parse(header: dict[str, Any], body: np.ndarray) -> CountedText:
    # The digest shows that the file is unmodified, not that it was correct.
    pattern, special_tokens, sizes = header["pattern"], header["special_tokens"], [header[name] for name in _SIZES]
    if not isinstance(special_tokens, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"special_tokens are {special_tokens!r}, {', '.join(_SIZES)} are {sizes!r}")
    _, num_pretokens, num_bytes = sizes
    if 16 * num_pretokens + num_bytes != len(body):
        raise ValueError(f"{num_pretokens} pretokens of {num_bytes} bytes are not {len(body)} bytes long")
    words = 8 * num_pretokens
    ends, numbers = (body[start : start + words].view("<i8").astype(np.int64, copy=False) for start in (0, words))
    counts = PretokenCounts(body[2 * words :], ends, numbers)
    if not counts.is_sound:
        raise ValueError("expected ascending ends of pretokens, and counts of at least 1")
    resolve_pattern(pattern)
    return CountedText(counts, pattern, check_special_tokens(special_tokens), sizes[0])


def _digest(header: dict[str, Any], parts: list[memoryview]) -> str:
    digest = hashlib.sha256(json.dumps(header, separators=(",", ":")).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
