"""Tokenizers as files: Tilewright's own `tokenizer.json`, and GPT-2's `vocab.json` with `merges.txt`.

The own format, version 1, is one JSON object in UTF-8:

    format          "tilewright-tokenizer"
    version         1
    sha256          of the four entries below, as compact ASCII JSON in this order
    pattern         the pretoken pattern
    special_tokens  {text: id}, by ascending id
    vocab           the token of each id, in order
    merges          "left right", in the order they apply

Tokens are written in GPT-2's alphabet, which gives every byte one printable character: bytes that print in Latin-1 stand
for themselves, the others (white space among them) are the characters from U+0100 on. Equal tokenizers give equal files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files import atomic_file, require_file
from .patterns import GPT2_PATTERN

_FORMAT = "tilewright-tokenizer"
_VERSION = 1
_CONTENT = ("pattern", "special_tokens", "vocab", "merges")


class TokenizerData(NamedTuple):
    """What defines a tokenizer: the token of each id, the merges in order, and the ids of the special tokens."""

    vocab: dict[int, bytes]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]


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


def fingerprint(data: TokenizerData) -> str:
    """Return the sha256, in hex, of everything that decides which ids a text gets."""
    return _digest(_content(data))


def save_tokenizer(path: Path | str, data: TokenizerData) -> None:
    """Write the native format to `path`, atomically."""
    content = _content(data)
    document = {"format": _FORMAT, "version": _VERSION, "sha256": _digest(content), **content}
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n")


def load_tokenizer(path: Path | str) -> TokenizerData:
    """Read the native format; a file that is missing, foreign, truncated or changed raises a `UserError`."""
    document = _read_object(require_file(path, "tokenizer file"))
    if document.get("format") != _FORMAT:
        raise UserError(f"tokenizer file {path} is of another format: only {_FORMAT!r} is read here")
    if document.get("version") != _VERSION:
        raise UserError(f"tokenizer file {path} has version {document.get('version')!r}: only {_VERSION} is known")
    content = {name: document.get(name) for name in _CONTENT}
    if document.get("sha256") != _digest(content):
        raise UserError(f"tokenizer file {path} was changed after it was written: its sha256 is {_digest(content)}")
    if content["pattern"] != GPT2_PATTERN:
        raise UserError(f"tokenizer file {path} has the pattern {content['pattern']!r}: only GPT-2's is known")
    return TokenizerData(
        vocab={id: from_printable(token) for id, token in enumerate(document["vocab"])},
        merges=[_parse_merge(merge, path) for merge in document["merges"]],
        special_tokens=document["special_tokens"],
    )


def read_gpt2_files(
    vocab_path: Path | str, merges_path: Path | str, special_tokens: Sequence[str]
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Return (vocab, merges) from GPT-2's vocab.json and merges.txt; in the vocabulary special tokens stand as plain text.

    Raises `UserError` for a file that is missing or malformed.
    """
    vocab: dict[int, bytes] = {}
    for token, id in _read_object(require_file(vocab_path, "vocabulary file")).items():
        if not isinstance(id, int) or id in vocab:
            raise UserError(
                f"vocabulary file {vocab_path} gives token {token!r} the id {id!r}: each needs an integer of its own"
            )
        vocab[id] = token.encode() if token in special_tokens else from_printable(token)
    text = _read_text(require_file(merges_path, "merges file"))
    # Not splitlines(), which also cuts at characters that are no line ends to GPT-2.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    return vocab, [_parse_merge(line, merges_path) for line in lines if line]


def _content(data: TokenizerData) -> dict[str, Any]:
    specials: Mapping[str, int] = data.special_tokens
    return {
        "pattern": GPT2_PATTERN,
        "special_tokens": {token: specials[token] for token in sorted(specials, key=specials.__getitem__)},
        "vocab": [to_printable(data.vocab[id]) for id in range(len(data.vocab))],
        "merges": [f"{to_printable(left)} {to_printable(right)}" for left, right in data.merges],
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _parse_merge(merge: str, path: Path | str) -> tuple[bytes, bytes]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise UserError(f"{path} has the merge {merge!r}: two tokens with a space between them are needed")
    return from_printable(left), from_printable(right)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON, or is cut off: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a JSON {type(document).__name__}: an object is needed")
    return document
