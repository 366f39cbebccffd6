"""What every format stores, and how tokens are written as text."""

import codecs
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from ..text.patterns import PATTERNS, pattern_name
from ..text.unicode_classes import unicode_of_regex

# There are tables with an entry for each id up to the greatest: from a strange file they must not take all memory.
MOST_IDS = 1 << 24


class TokenizerData(NamedTuple):
    """What defines a tokenizer.

    `vocab` gives the token of each id (ids may have gaps), `merges` apply in their order, `special_tokens` gives the ids of
    the special ones, `pattern` is the name of a pretoken pattern or a regular expression. `training` holds figures of the
    training for people to read; it decides nothing. With `ignore_merges` a pretoken that is a token stays one, whether merges
    make it or not. `plain_tokens` are those of the special tokens that belong to the text for whoever reads it, such as Qwen3's
    `<think>`: they are decoded where special tokens are left out.
    """

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]
    pattern: str = "gpt2"
    training: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    plain_tokens: frozenset[str] = frozenset()


def content_of(data: TokenizerData) -> dict[str, Any]:
    """Return everything that decides which ids a text gets, as JSON values; equal tokenizers give equal contents."""
    specials = data.special_tokens
    content = {
        "pattern": stored_pattern(data.pattern),
        "special_tokens": {token: specials[token] for token in sorted(specials, key=specials.__getitem__)},
        "vocab": [to_printable(data.vocab[id]) if id in data.vocab else None for id in range(max(data.vocab) + 1)],
        "merges": [merge_text(merge) for merge in data.merges],
    }
    # Only where it is true, so that the contents of all others are what they were before it was known.
    return {**content, "ignore_merges": True} if data.ignore_merges else content


def stored_pattern(pattern: str) -> str:
    """Return a pattern as files and fingerprints have it: by name only if it was known by name from the beginning.

    Tokenizers made before a pattern had a name have its regular expression in their fingerprints, in runs and token files.
    """
    return pattern if pattern in ("gpt2", "cl100k", "o200k") else PATTERNS.get(pattern, pattern)


def digest(content: dict[str, Any]) -> str:
    """Return the sha256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def fingerprint(data: TokenizerData) -> str:
    """Return the sha256, in hex, of everything that decides which ids a text gets."""
    content = content_of(data)
    if pattern_name(data.pattern) is None and (unicode := unicode_of_regex()) is not None:
        content["unicode"] = unicode
    return digest(content)


@cache
def _alphabet() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


@cache
def _alphabet_bytes() -> dict[str, int]:
    return {character: byte for byte, character in _alphabet().items()}


def to_printable(token: bytes) -> str:
    """Write bytes in GPT-2's alphabet, one printable character a byte."""
    return token.decode("latin-1").translate(_alphabet())


def from_printable(text: str) -> bytes:
    """Read bytes written in GPT-2's alphabet; a character outside it raises a `UserError`."""
    try:
        return bytes(map(_alphabet_bytes().__getitem__, text))
    except KeyError as error:
        raise UserError(f"token {text!r} holds {error.args[0]!r}, which is not in GPT-2's byte alphabet") from None


def merge_text(merge: tuple[bytes, bytes]) -> str:
    """Write a merge as its two tokens in GPT-2's alphabet, with a space between them."""
    left, right = merge
    return f"{to_printable(left)} {to_printable(right)}"


def parse_merge(merge: Any, path: Path | str) -> tuple[bytes, bytes]:
    """Read a merge that `merge_text` wrote, or a list of its tokens; else raise a `UserError` that names the file at `path`."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise UserError(f"{path} has the merge {merge!r:.60}: two tokens with a space between them are needed")
    return _from_printable(parts[0], path), _from_printable(parts[1], path)


def _from_printable(text: str, path: Path | str) -> bytes:
    try:
        return from_printable(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def printable_vocab(data: TokenizerData) -> dict[str, int]:
    """Return {text: id} by ascending id: special tokens as they are, all others in GPT-2's alphabet.

    A special token that reads like another token raises a `UserError`: one of the two would be lost.
    """
    names = {id: name for name, id in data.special_tokens.items()}
    ids: dict[str, int] = {}
    for id in sorted(data.vocab):
        text = names.get(id) or to_printable(data.vocab[id])
        if (first := ids.setdefault(text, id)) != id:
            raise UserError(
                f"special token {text!r} reads like another token, ids {first} and {id}: this format cannot hold both"
            )
    return ids


def check_id(id: Any, text: str, path: Path | str) -> int:
    """Return the id that the file at `path` gives a token; one that is none raises a `UserError`."""
    if type(id) is not int or not 0 <= id < MOST_IDS:
        raise UserError(f"{path} gives token {text!r} the id {id!r}: an integer from 0 to {MOST_IDS - 1} is needed")
    return id


def parse_vocab(ids: Mapping[str, Any], special_tokens: "set[str]", path: Path | str) -> dict[int, bytes]:
    """Read what `printable_vocab` wrote; an id that is none, or is given twice, raises a `UserError`."""
    vocab: dict[int, bytes] = {}
    for text, id in ids.items():
        if check_id(id, text, path) in vocab:
            raise UserError(f"{path} gives token {text!r} the id {id!r}, which is that of another: each needs its own")
        vocab[id] = text.encode() if text in special_tokens else _from_printable(text, path)
    return vocab


def entry(part: Any, name: str, kind: type, above: str = "") -> Any:
    """Return an entry of a JSON object; one that is missing or of another kind raises a `UserError`."""
    value = part.get(name) if isinstance(part, dict) else None
    if not isinstance(value, kind):
        needed = {dict: "an object", list: "a list", str: "a string"}[kind]
        raise UserError(f"{above}{name} is {json.dumps(value, ensure_ascii=False)[:100]}: {needed} is needed")
    return value


def read_text(path: Path) -> str:
    """Return the text of a file; one that is not UTF-8, or begins with a byte order mark, raises a `UserError`."""
    data = path.read_bytes()
    if data.startswith(codecs.BOM_UTF8):
        raise UserError(f"{path} begins with a byte order mark: UTF-8 without one is needed")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; anything else in it raises a `UserError`."""
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON, or is cut off: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a JSON {type(document).__name__}: an object is needed")
    return document
