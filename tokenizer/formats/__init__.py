"""Tokenizers as files: Tilewright's own, Hugging Face's `tokenizer.json`, tiktoken's ranks, GPT-2's two files.

Every format gives the same ids, or is refused with the reason.
"""

from pathlib import Path

from ...errors import UserError
from ...files import require_file
from .gpt2 import read_gpt2_files, save_gpt2_files
from .huggingface import parse_huggingface, save_huggingface
from .native import FORMAT, parse_native, save_tokenizer
from .ranks import load_tiktoken, save_tiktoken
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
    "to_printable",
]


def load_tokenizer(path: Path | str) -> TokenizerData:
    """Read Tilewright's own file or Hugging Face's `tokenizer.json`.

    A file that is missing, foreign, truncated or changed, or that would give other ids here, raises a `UserError`.
    """
    document = read_object(require_file(path, "tokenizer file"))
    if document.get("format") == FORMAT:
        return parse_native(document, path)
    if isinstance(document.get("model"), dict):
        return parse_huggingface(document, path)
    raise UserError(f"tokenizer file {path} is of another format: only {FORMAT!r} and Hugging Face's are read here")
