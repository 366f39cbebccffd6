"""Tokenizer files: Tilewright's own, Hugging Face's `tokenizer.json`, tiktoken's ranks, GPT-2's two files.

A file either gives the same ids as in its own library, or is refused with a reason.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ...files import require_file
from ..text.patterns import check_special_tokens
from .gpt2 import VOCAB_FILE, load_gpt2, read_gpt2_files, save_gpt2_files
from .huggingface import parse_huggingface, save_huggingface
from .native import FORMAT, parse_native, save_tokenizer
from .ranks import load_tiktoken, save_tiktoken
from .template import template_prefix
from .tokenizer_data import MOST_IDS, TokenizerData, fingerprint, from_printable, read_object, to_printable

__all__ = [
    "MOST_IDS",
    "TokenizerData",
    "fingerprint",
    "from_printable",
    "load_tiktoken",
    "load_tokenizer",
    "read_gpt2_files",
    "save_gpt2_files",
    "save_huggingface",
    "save_tiktoken",
    "save_tokenizer",
    "template_prefix",
    "to_printable",
]

_BASE64 = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} ?")
_PREFIX_BYTES = 1 << 12


def load_tokenizer(
    path: Path | str,
    pattern: str | None = None,
    special_tokens: Mapping[str, int] | Sequence[str] = (),
    *,
    ignore_template: bool = False,
) -> TokenizerData:
    """Read Tilewright's own file, Hugging Face's `tokenizer.json`, tiktoken's ranks, or a folder with GPT-2's two files.

    tiktoken's ranks and GPT-2's files store neither a `pattern` (default: GPT-2's) nor special tokens. Special tokens without
    ids get the ids after the last one. `ignore_template` ignores the tokens that a `tokenizer.json` adds to every text. A
    file that is missing, unsupported, truncated or modified, or that would give other ids here, raises a `UserError`.
    """
    path = Path(path)
    check_special_tokens(tuple(special_tokens) if isinstance(special_tokens, Mapping) else special_tokens)
    if path.is_dir() and not (path / "tokenizer.json").exists() and (path / VOCAB_FILE).exists():
        return load_gpt2(path, pattern or "gpt2", special_tokens)
    file = require_file(path / "tokenizer.json" if path.is_dir() else path, "tokenizer file")
    if _begins_with_rank(file):
        return load_tiktoken(file, pattern or "gpt2", special_tokens)
    document = read_object(file)
    if pattern is not None or special_tokens:
        raise UserError(f"{file} stores its own pattern and special tokens: omit both arguments")
    if document.get("format") == FORMAT:
        return parse_native(document, file)
    if isinstance(document.get("model"), dict):
        return parse_huggingface(document, file, ignore_template=ignore_template)
    raise UserError(
        f"tokenizer file {file} has an unknown format: expected {FORMAT!r}, Hugging Face's tokenizer.json, tiktoken's ranks,"
        " or a folder with GPT-2's vocab.json and merges.txt"
    )


def _begins_with_rank(file: Path) -> bool:
    with file.open("rb") as stream:
        begin = stream.read(_PREFIX_BYTES)
    # The first token may be longer than the prefix.
    found = _BASE64.match(begin)
    return found is not None and (begin[found.end() : found.end() + 1].isdigit() or found.end() == _PREFIX_BYTES)
