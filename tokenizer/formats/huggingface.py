"""Hugging Face's `tokenizer.json`: one file for all kinds of tokenizers; byte-level BPE uses a small part of it.

A file is read only if it gives the same ids here. Anything else (normalizers, unknown pre-tokenizers, templates around the
text, dropout, ...) is refused by name. All added tokens become special tokens here, because both libraries match them before
anything else. Those not marked as special become `plain_tokens`, which decoding never skips.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import atomic_file
from ..text.patterns import check_special_tokens
from .pre_tokenizers import pattern_of, pre_tokenizer_of
from .ranks import check_ranks
from .tokenizer_data import TokenizerData, check_id, entry, merge_text, parse_merge, parse_vocab, printable_vocab

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def save_huggingface(path: Path | str, data: TokenizerData) -> None:
    """Write a `tokenizer.json` for Hugging Face's tokenizers, atomically.

    A special token with the text of another token, or a pattern that the library's engine may read differently, raises a
    `UserError`.
    """
    specials = sorted(data.special_tokens.items(), key=lambda item: item[1])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": token not in data.plain_tokens} for token, id in specials
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_of(data.pattern),
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": data.ignore_merges,
            "vocab": printable_vocab(data),
            "merges": [merge_text(merge) for merge in data.merges],
        },
    }
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n")


def parse_huggingface(document: dict[str, Any], path: Path | str, *, ignore_template: bool = False) -> TokenizerData:
    """Read a `tokenizer.json` from its JSON object; a malformed file or one with other ids raises a `UserError`.

    With `ignore_template` the ids equal the library's `encode(text, add_special_tokens=False)`.
    """
    try:
        return _parse(document, path, ignore_template)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer.json of Hugging Face: {type(error).__name__} {error}") from None
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _parse(document: dict[str, Any], path: Path | str, ignore_template: bool) -> TokenizerData:
    model = document["model"]
    for normalizer in _parts(document.get("normalizer"), "normalizers"):
        _require(False, path, "normalizer", normalizer, "null or an empty Sequence")
    for name in ("truncation", "padding"):
        _require(document.get(name) is None, path, name, document.get(name), "null")
    for processor in _parts(document.get("post_processor"), "processors"):
        _check_post_processor(processor, path, ignore_template)
    _require(_type(document.get("decoder")) in (None, "ByteLevel"), path, "decoder", document.get("decoder"), "ByteLevel")
    # GPT-2's own file predates the field `type`.
    kind = model.get("type", "BPE" if "merges" in model else None)
    _require(kind == "BPE", path, "model.type", kind, "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _require(not model.get(name), path, f"model.{name}", model.get(name), "none")
    pattern = pattern_of(document.get("pre_tokenizer"))

    special_tokens: dict[str, int] = {}
    added = entry(document, "added_tokens", list) if document.get("added_tokens") else []
    for index, token in enumerate(added):
        name = entry(token, "content", str, f"added_tokens[{index}].")
        for flag in ("single_word", "lstrip", "rstrip"):
            _require(not token.get(flag), path, f"added token {name!r}: {flag}", token.get(flag), "false")
        special_tokens[name] = check_id(token.get("id"), name, path)
    check_special_tokens(tuple(special_tokens))
    _check_order([[token["content"] for token in added if bool(token.get("normalized")) == late] for late in (False, True)])
    vocab = parse_vocab(entry(model, "vocab", dict, "model."), set(special_tokens), path)
    for name, id in special_tokens.items():
        if vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"{path} gives the added token {name!r} the id {id}, which belongs to {vocab[id]!r}")
    merges = [parse_merge(merge, path) for merge in entry(model, "merges", list, "model.")]
    plain_tokens = frozenset(token["content"] for token in added if token.get("special") is False)
    data = TokenizerData(vocab, merges, special_tokens, pattern, plain_tokens=plain_tokens)
    return data._replace(ignore_merges=bool(model.get("ignore_merges")) and not _is_ordered(data))


def _is_ordered(data: TokenizerData) -> bool:
    """Return whether merging alone has the effect of `ignore_merges`, so that the flag is redundant."""
    try:
        check_ranks(data)
    except UserError:
        return False
    return True


def _check_post_processor(processor: Any, path: Path | str, ignore_template: bool) -> None:
    kind = _type(processor)
    if kind == "ByteLevel" or ignore_template:
        return
    known = kind == "TemplateProcessing" and isinstance(processor.get("single"), list)
    _require(known, path, "post_processor", processor, "ByteLevel and TemplateProcessing that adds nothing")
    pieces = [piece for piece in processor["single"] if not isinstance(piece, dict) or "Sequence" not in piece]
    added = [entry(entry(piece, "SpecialToken", dict, "single."), "id", str, "single.SpecialToken.") for piece in pieces]
    if added:
        raise UserError(
            f"{path} has a post_processor that adds {', '.join(map(repr, added))} to every text, which is not supported:"
            " set ignore_template=True to ignore it"
        )


def _check_order(added: list[list[str]]) -> None:
    """Raise a `UserError` if the order in which the two groups of added tokens are matched affects the result.

    The library matches tokens that are not `normalized` first, then the others in the remaining text. Here the leftmost of
    all tokens matches. The results differ if a token of the second group begins before one of the first and overlaps it.
    """
    first, second = added
    whole = set(first)
    begins = {token[:size] for token in first for size in range(1, len(token) + 1)}
    for token in second if first else ():
        parts = {token[start:end] for start in range(len(token)) for end in range(start + 1, len(token) + 1)}
        if whole & parts or any(token[start:] in begins for start in range(1, len(token))):
            raise UserError(
                f"added token {token!r} is normalized and may overlap a token that is not: tokenizers matches the other first,"
                " which is not supported here"
            )


def _parts(part: Any, name: str) -> Iterator[Any]:
    """Yield the leaves of nested sequences; nothing for null."""
    if _type(part) == "Sequence":
        for each in entry(part, name, list):
            yield from _parts(each, name)
    elif part is not None:
        yield part


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else part


def _require(condition: bool, path: Path | str, name: str, value: Any, allowed: str) -> None:
    if not condition:
        shown = json.dumps(value, ensure_ascii=False)
        raise UserError(f"{path} has {name} {shown[:100]}, which would give other ids here: expected {allowed}")
