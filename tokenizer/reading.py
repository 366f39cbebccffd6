"""Read a tokenizer file: as `Tokenizer` if it gives the same ids, else through the library `tokenizers`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from ..files import require_file
from .formats.tokenizer_data import read_object
from .huggingface_tokenizer import HuggingFaceTokenizer
from .tokenizer import Tokenizer

AnyTokenizer = Tokenizer | HuggingFaceTokenizer
"""A tokenizer that `read_tokenizer` returns: `Tokenizer | HuggingFaceTokenizer`."""

_FILE, _SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"


def read_tokenizer(
    path: Path | str, *, pattern: str | None = None, special_tokens: Mapping[str, int] | Sequence[str] = ()
) -> AnyTokenizer:
    """Read a tokenizer in any format of `Tokenizer.load`, or a `tokenizer.json` that only `tokenizers` can run.

    The latter needs the extra `hf`. The template of a file, which adds tokens to every text, is ignored. A file that neither
    can read raises a `UserError`.
    """
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    if not file.exists() and file.name == _FILE and (file.parent / _SENTENCEPIECE_FILE).exists():
        raise UserError(
            f"{file.parent} has a {_SENTENCEPIECE_FILE} but no {_FILE}: convert it with transformers,"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    try:
        return Tokenizer.load(path, pattern=pattern, special_tokens=special_tokens, ignore_template=True)
    except UserError:
        if not _is_huggingface(file) or pattern is not None or special_tokens:
            raise
    return HuggingFaceTokenizer(file)


def _is_huggingface(file: Path) -> bool:
    try:
        return isinstance(read_object(require_file(file, "tokenizer file")).get("model"), dict)
    except (UserError, OSError):
        return False
