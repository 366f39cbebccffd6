"""Tilewright's own `tokenizer.json`.

Version 2 is one JSON object in UTF-8:

    format          "tilewright-tokenizer"
    version         2
    sha256          of the entries from `pattern` to `ignore_merges`, as compact ASCII JSON in this order
    pattern         the pretoken pattern: gpt2, cl100k, o200k, or a regular expression
    special_tokens  {text: id}, by ascending id
    vocab           the token of each id, in order; null for an unused id
    merges          "left right", in the order they apply
    ignore_merges   true if a pretoken that is a token becomes that token without merging; absent otherwise
    plain_tokens    the special tokens that decoding never skips, sorted; optional, not covered by the sha256
    training        figures of the training, for information only; optional, not covered by the sha256

Tokens are written in GPT-2's alphabet, which maps every byte to one printable character: bytes that print in Latin-1 map to
themselves, the others (including white space) to the characters from U+0100 on. Equal tokenizers give identical files.
"""

import json
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import atomic_file
from ..text.patterns import pattern_name
from .tokenizer_data import TokenizerData, content_of, digest, from_printable, parse_merge

FORMAT = "tilewright-tokenizer"
_VERSION = 2
_CONTENT = ("pattern", "special_tokens", "vocab", "merges")


def save_tokenizer(path: Path | str, data: TokenizerData) -> None:
    """Write the native format to `path`, atomically."""
    content = content_of(data)
    document = {"format": FORMAT, "version": _VERSION, "sha256": digest(content), **content}
    if data.plain_tokens:
        document["plain_tokens"] = sorted(data.plain_tokens)
    if data.training is not None:
        document["training"] = dict(data.training)
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n")


def parse_native(document: dict[str, Any], path: Path | str) -> TokenizerData:
    """Read the native format from its JSON object; another version or a modified file raises a `UserError`."""
    if document.get("version") != _VERSION:
        raise UserError(f"tokenizer file {path} has version {document.get('version')!r}: expected {_VERSION}")
    content = {name: document.get(name) for name in _CONTENT}
    if "ignore_merges" in document:
        content["ignore_merges"] = document["ignore_merges"]
    if document.get("sha256") != digest(content):
        raise UserError(f"tokenizer file {path} was modified after it was written: its sha256 is {digest(content)}")
    try:
        return _parse(document, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"tokenizer file {path} is malformed: {type(error).__name__} {error}") from None


def _parse(document: dict[str, Any], path: Path | str) -> TokenizerData:
    vocab = {id: from_printable(token) for id, token in enumerate(document["vocab"]) if token is not None}
    special_tokens, pattern, training = document["special_tokens"], document["pattern"], document.get("training")
    for name, id in special_tokens.items():
        if vocab.get(id) != name.encode():
            raise UserError(f"tokenizer file {path} gives special token {name!r} the id {id!r}, but the vocabulary disagrees")
    ignore_merges = document.get("ignore_merges", False)
    if not isinstance(pattern, str) or not isinstance(training, dict | None) or not isinstance(ignore_merges, bool):
        raise TypeError(f"pattern is {pattern!r}, training is {training!r}, ignore_merges is {ignore_merges!r}")
    plain_tokens = frozenset(document.get("plain_tokens", ()))
    if unknown := plain_tokens - set(special_tokens):
        raise UserError(f"tokenizer file {path} has plain_tokens {sorted(unknown)}, which are not among its special tokens")
    merges = [parse_merge(merge, path) for merge in document["merges"]]
    return TokenizerData(vocab, merges, special_tokens, pattern_name(pattern) or pattern, training, ignore_merges, plain_tokens)
