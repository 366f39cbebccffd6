"""Tokenizers as files: Tilewright's own, Hugging Face's `tokenizer.json`, tiktoken's ranks, GPT-2's two files.

Every format gives the same ids, or is refused with the reason.
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
_LOOKED_AT = 1 << 12


def load_tokenizer(
    path: Path | str,
    pattern: str | None = None,
    special_tokens: Mapping[str, int] | Sequence[str] = (),
    *,
    ignore_template: bool = False,
) -> TokenizerData:
    """Read Tilewright's own file, Hugging Face's `tokenizer.json`, tiktoken's ranks, or a folder with GPT-2's two files.

    Ranks and GPT-2's files store neither the `pattern`, GPT-2's if none is given, nor the special tokens, which follow the last
    id where they come without ids. `ignore_template` reads a `tokenizer.json` without what it adds to every text. A file that
    is missing, foreign, truncated or changed, or that would give other ids here, raises a `UserError`.
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
        raise UserError(f"{file} stores its pattern and its special tokens: they cannot be given")
    if document.get("format") == FORMAT:
        return parse_native(document, file)
    if isinstance(document.get("model"), dict):
        return parse_huggingface(document, file, ignore_template=ignore_template)
    raise UserError(
        f"tokenizer file {file} is of another format: read are {FORMAT!r}, Hugging Face's tokenizer.json, tiktoken's ranks, and"
        " folders with GPT-2's vocab.json and merges.txt"
    )


def _begins_with_rank(file: Path) -> bool:
    with file.open("rb") as stream:
        begin = stream.read(_LOOKED_AT)
    # A first token may be longer than what is looked at.
    found = _BASE64.match(begin)
    return found is not None and (begin[found.end() : found.end() + 1].isdigit() or found.end() == _LOOKED_AT)
