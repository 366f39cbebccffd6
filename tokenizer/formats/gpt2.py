"""GPT-2's two files: `vocab.json`, the id of each token, and `merges.txt`, a merge a line.

Both write tokens in GPT-2's alphabet. Special tokens stand in the vocabulary as plain text and nothing tells them from the
others, nor is the pattern stored: whoever reads the files has to know both.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ...files import atomic_file, require_file
from .tokenizer_data import (
    TokenizerData,
    check_id,
    merge_text,
    parse_merge,
    parse_vocab,
    printable_vocab,
    read_object,
    read_text,
)

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"


def save_gpt2_files(folder: Path | str, data: TokenizerData) -> None:
    """Write vocab.json and merges.txt into `folder`, each atomically."""
    if data.ignore_merges:
        raise UserError("ignore_merges is true, which vocab.json and merges.txt cannot say: they would give other ids")
    folder = Path(folder)
    vocab = json.dumps(printable_vocab(data), ensure_ascii=False)
    merges = "".join(f"{line}\n" for line in ("#version: 0.2", *map(merge_text, data.merges)))
    for name, text in ((VOCAB_FILE, vocab), (MERGES_FILE, merges)):
        with atomic_file(folder / name) as file:
            file.write(text.encode())


def load_gpt2(folder: Path, pattern: str, special_tokens: Mapping[str, int] | Sequence[str]) -> TokenizerData:
    """Read the two files in a folder; special tokens that come without ids, and are not there, follow the greatest one."""
    vocab, merges = read_gpt2_files(folder / VOCAB_FILE, folder / MERGES_FILE, tuple(special_tokens))
    ids = {token: id for id, token in vocab.items()}
    found: dict[str, int] = {}
    for name in special_tokens:
        wanted = special_tokens[name] if isinstance(special_tokens, Mapping) else None
        id = ids.get(name.encode(), max(vocab) + 1 if wanted is None else check_id(wanted, name, folder))
        if wanted not in (None, id) or vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"special token {name!r} has the id {wanted}, which {folder / VOCAB_FILE} gives otherwise")
        found[name] = id
    return TokenizerData(vocab, merges, found, pattern)


def read_gpt2_files(
    vocab_path: Path | str, merges_path: Path | str, special_tokens: Sequence[str]
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Return (vocab, merges) from GPT-2's vocab.json and merges.txt.

    Raises `UserError` for a file that is missing or malformed.
    """
    vocab = parse_vocab(read_object(require_file(vocab_path, "vocabulary file")), set(special_tokens), vocab_path)
    text = read_text(require_file(merges_path, "merges file"))
    # Not splitlines(), which also cuts at characters that are no line ends to GPT-2.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    return vocab, [parse_merge(line, merges_path) for line in lines if line]
