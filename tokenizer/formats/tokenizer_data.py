"""The content common to all formats, and the representation of tokens as text."""

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

# Limit for ids in files: some tables have an entry for each id up to the largest, and must fit in memory.
MOST_IDS = 1 << 24


class TokenizerData(NamedTuple):
    """The definition of a tokenizer.

    `vocab` maps each id to its token (ids may have gaps). `merges` apply in their order. `special_tokens` maps special tokens
    to their ids. `pattern` is the name of a pretoken pattern or a regular expression. `training` holds figures of the
    training, for information only. With `ignore_merges`, a pretoken that is a token becomes that token without merging.
    `plain_tokens` are the special tokens that belong to the text for its reader, such as Qwen3's `<think>`: decoding never
    skips them.
    """

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]
    pattern: str = "gpt2"
    training: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    plain_tokens: frozenset[str] = frozenset()


def content_of(data: TokenizerData) -> dict[str, Any]:
    """Return everything that determines the ids of a text, as JSON values; equal tokenizers give equal contents."""
    specials = data.special_tokens
    content = {
        "pattern": stored_pattern(data.pattern),
        "special_tokens": {token: specials[token] for token in sorted(specials, key=specials.__getitem__)},
        "vocab": [to_printable(data.vocab[id]) if id in data.vocab else None for id in range(max(data.vocab) + 1)],
        "merges": [merge_text(merge) for merge in data.merges],
    }
    # Omit the flag if it is false: contents and fingerprints from before the flag existed stay valid.
    return {**content, "ignore_merges": True} if data.ignore_merges else content


def stored_pattern(pattern: str) -> str:
    """Return a pattern as files and fingerprints store it: by name only for the three original names.

    Patterns that were named later are stored as regular expressions, so that the fingerprints in older runs and token files
    stay valid.
    """
    return pattern if pattern in ("gpt2", "cl100k", "o200k") else PATTERNS.get(pattern, pattern)


def digest(content: dict[str, Any]) -> str:
    """Return the sha256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def fingerprint(data: TokenizerData) -> str:
    """Return the sha256, in hex, of everything that determines the ids of a text."""
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
    """Read a merge from the text of `merge_text` or from a list of two tokens; `path` names the file in the `UserError`."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise UserError(f"{path} has the merge {merge!r:.60}: expected two tokens with a space between them")
    return _from_printable(parts[0], path), _from_printable(parts[1], path)


def _from_printable(text: str, path: Path | str) -> bytes:
    try:
        return from_printable(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def printable_vocab(data: TokenizerData) -> dict[str, int]:
    """Return {text: id} by ascending id: special tokens as they are, all others in GPT-2's alphabet.

    A special token with the text of another token raises a `UserError`: the mapping would lose one of the two.
    """
    names = {id: name for name, id in data.special_tokens.items()}
    ids: dict[str, int] = {}
    for id in sorted(data.vocab):
        text = names.get(id) or to_printable(data.vocab[id])
        if (first := ids.setdefault(text, id)) != id:
            raise UserError(
                f"special token {text!r} has the same text as another token, ids {first} and {id}: the format cannot store both"
            )
    return ids


def check_id(id: Any, text: str, path: Path | str) -> int:
    """Return the id that the file at `path` gives a token; an invalid id raises a `UserError`."""
    if type(id) is not int or not 0 <= id < MOST_IDS:
        raise UserError(f"{path} gives token {text!r} the id {id!r}: expected an integer from 0 to {MOST_IDS - 1}")
    return id


def parse_vocab(ids: Mapping[str, Any], special_tokens: "set[str]", path: Path | str) -> dict[int, bytes]:
    """Read the output of `printable_vocab`; an invalid or duplicate id raises a `UserError`."""
    vocab: dict[int, bytes] = {}
    for text, id in ids.items():
        if check_id(id, text, path) in vocab:
            raise UserError(f"{path} gives token {text!r} the id {id!r} of another token: expected a distinct id")
        vocab[id] = text.encode() if text in special_tokens else _from_printable(text, path)
    return vocab


def entry(part: Any, name: str, kind: type, above: str = "") -> Any:
    """Return an entry of a JSON object; a missing entry or one of another type raises a `UserError`."""
    value = part.get(name) if isinstance(part, dict) else None
    if not isinstance(value, kind):
        needed = {dict: "an object", list: "a list", str: "a string"}[kind]
        raise UserError(f"{above}{name} is {json.dumps(value, ensure_ascii=False)[:100]}: expected {needed}")
    return value


def read_text(path: Path) -> str:
    """Return the text of a file; invalid UTF-8 or a byte order mark raises a `UserError`."""
    data = path.read_bytes()
    if data.startswith(codecs.BOM_UTF8):
        raise UserError(f"{path} begins with a byte order mark: expected UTF-8 without one")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; other content raises a `UserError`."""
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON, or is cut off: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a JSON {type(document).__name__}: expected an object")
    return document
