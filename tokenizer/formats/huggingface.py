"""Hugging Face's `tokenizer.json`: everything in one file, of which byte-level BPE uses a small part.

Read is what gives the same ids here; whatever would change them (normalizers, other pre-tokenizers, templates around the
text, dropout, ...) is refused by name. Added tokens are special tokens here, whether they are marked so or not: both
libraries find them in the text before anything else.
"""

import json
import re
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import atomic_file
from ..text.patterns import GPT2_PATTERN
from .ranks import check_ranks
from .tokenizer_data import TokenizerData, check_id, merge_text, parse_merge, parse_vocab, printable_vocab

# That library's engine is Oniguruma, to which `{1,3}+` is no possessive repeat, `$` the end of any line, `\w` a wider class.
_CONSTRUCTS = re.compile(r"\\.|\{[\d,]+\}\+|\$|(?<!\[)\^|\[\[|&&|\(\?P", re.DOTALL)
_FOREIGN_ESCAPES = [f"\\{letter}" for letter in "wWbBhHZXRGK"]
_SPELLINGS = {
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s+\z|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
}
# As OpenAI published it; ByteLevel alone means the same.
_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_NAMES = {_GPT2: "gpt2", GPT2_PATTERN: "gpt2"} | {spelling: name for name, spelling in _SPELLINGS.items()}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def save_huggingface(path: Path | str, data: TokenizerData) -> None:
    """Write a `tokenizer.json` that Hugging Face's tokenizers reads, atomically.

    A special token that reads like another token, and a pattern that its engine takes otherwise, raise a `UserError`.
    """
    specials = sorted(data.special_tokens.items(), key=lambda item: item[1])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **flags} for token, id in specials],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(data.pattern),
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
            "ignore_merges": False,
            "vocab": printable_vocab(data),
            "merges": [merge_text(merge) for merge in data.merges],
        },
    }
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode() + b"\n")


def parse_huggingface(document: dict[str, Any], path: Path | str) -> TokenizerData:
    """Read a `tokenizer.json` from its JSON object; one that is malformed, or would give other ids, raises a `UserError`."""
    try:
        return _parse(document, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no tokenizer.json of Hugging Face's: {type(error).__name__} {error}") from None


def _parse(document: dict[str, Any], path: Path | str) -> TokenizerData:
    model = document["model"]
    for name in ("normalizer", "truncation", "padding"):
        _require(document.get(name) is None, path, name, document.get(name), "null")
    post_processor = document.get("post_processor")
    _require(_type(post_processor) in (None, "ByteLevel"), path, "post_processor", post_processor, "null and ByteLevel")
    _require(_type(document.get("decoder")) in (None, "ByteLevel"), path, "decoder", document.get("decoder"), "ByteLevel")
    # GPT-2's own file is from before models had a type.
    kind = model.get("type", "BPE" if "merges" in model else None)
    _require(kind == "BPE", path, "model.type", kind, "BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _require(not model.get(name), path, f"model.{name}", model.get(name), "none")
    pattern = _pattern_of(document.get("pre_tokenizer"), path)

    special_tokens: dict[str, int] = {}
    added = document.get("added_tokens") or []
    for token in added:
        for flag in ("single_word", "lstrip", "rstrip"):
            _require(not token.get(flag), path, f"added token {token['content']!r}: {flag}", token.get(flag), "false")
        special_tokens[token["content"]] = check_id(token["id"], token["content"], path)
    same = len({bool(token.get("normalized")) for token in added}) < 2
    _require(same, path, "added_tokens: normalized", "mixed", "one value for all")
    vocab = parse_vocab(model["vocab"], set(special_tokens), path)
    for name, id in special_tokens.items():
        if vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"{path} gives the added token {name!r} the id {id}, which is that of {vocab[id]!r}")
    merges = [parse_merge(merge if isinstance(merge, str) else " ".join(merge), path) for merge in model["merges"]]
    data = TokenizerData(vocab, merges, special_tokens, pattern)
    if model.get("ignore_merges"):
        # It means that a pretoken that is a token stays one. In an ordered vocabulary merges come to the same.
        check_ranks(data)
    return data


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if pattern == "gpt2":
        return {**_BYTE_LEVEL, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": _own_spelling(pattern)}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


def _pattern_of(pre_tokenizer: Any, path: Path | str) -> str:
    allowed = "ByteLevel, or a Split by a regular expression and then ByteLevel without one"
    steps = pre_tokenizer["pretokenizers"] if _type(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    kinds = [_type(step) for step in steps]
    _require(kinds in (["ByteLevel"], ["Split", "ByteLevel"]), path, "pre_tokenizer", " + ".join(map(str, kinds)), allowed)
    _require(not steps[-1].get("add_prefix_space"), path, "pre_tokenizer.add_prefix_space", True, "false")
    uses_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        _require(uses_regex, path, "pre_tokenizer.use_regex", uses_regex, "true")
        return "gpt2"
    split = steps[0]
    _require(not uses_regex, path, "pre_tokenizer.use_regex", uses_regex, "false after a Split")
    _require("Regex" in split["pattern"], path, "pre_tokenizer.pattern", split["pattern"], "a regular expression")
    _require(split["behavior"] == "Isolated", path, "pre_tokenizer.behavior", split["behavior"], "Isolated")
    _require(not split.get("invert"), path, "pre_tokenizer.invert", split.get("invert"), "false")
    pattern = split["pattern"]["Regex"]
    return _NAMES.get(pattern) or _own_spelling(pattern)


def _own_spelling(pattern: str) -> str:
    if pattern in _SPELLINGS:
        return _SPELLINGS[pattern]
    for found in _CONSTRUCTS.finditer(pattern):
        construct = found.group()
        if not construct.startswith("\\") or construct in _FOREIGN_ESCAPES:
            raise UserError(f"pattern {pattern!r} holds {construct!r}, which means something else in Hugging Face's engine")
    return pattern


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else part


def _require(condition: bool, path: Path | str, name: str, value: Any, allowed: str) -> None:
    if not condition:
        shown = json.dumps(value, ensure_ascii=False)
        raise UserError(f"{path} has {name} {shown[:100]}, which would give other ids here: only {allowed} can be read")
