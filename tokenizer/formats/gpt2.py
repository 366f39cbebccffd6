"""GPT-2's two files: `vocab.json` maps each token to its id, and `merges.txt` lists one merge a line.

Both write tokens in GPT-2's alphabet. The files store no pattern, and the vocabulary does not mark special tokens, which it
stores as plain text. The caller has to supply both.
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
        raise UserError("ignore_merges is true: vocab.json and merges.txt cannot store it and would give other ids")
    folder = Path(folder)
    vocab = json.dumps(printable_vocab(data), ensure_ascii=False)
    merges = "".join(f"{line}\n" for line in ("#version: 0.2", *map(merge_text, data.merges)))
    for name, text in ((VOCAB_FILE, vocab), (MERGES_FILE, merges)):
        with atomic_file(folder / name) as file:
            file.write(text.encode())


def load_gpt2(folder: Path, pattern: str, special_tokens: Mapping[str, int] | Sequence[str]) -> TokenizerData:
    """Read the two files of a folder; new special tokens without ids get the ids after the largest one."""
    vocab, merges = read_gpt2_files(folder / VOCAB_FILE, folder / MERGES_FILE, tuple(special_tokens))
    ids = {token: id for id, token in vocab.items()}
    found: dict[str, int] = {}
    for name in special_tokens:
        requested = special_tokens[name] if isinstance(special_tokens, Mapping) else None
        id = ids.get(name.encode(), max(vocab) + 1 if requested is None else check_id(requested, name, folder))
        if requested not in (None, id) or vocab.setdefault(id, name.encode()) != name.encode():
            raise UserError(f"special token {name!r} has the id {requested}, but {folder / VOCAB_FILE} has another")
        found[name] = id
    return TokenizerData(vocab, merges, found, pattern)


def read_gpt2_files(
    vocab_path: Path | str, merges_path: Path | str, special_tokens: Sequence[str]
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Return (vocab, merges) from GPT-2's vocab.json and merges.txt.

    A missing or malformed file raises a `UserError`.
    """
    vocab = parse_vocab(read_object(require_file(vocab_path, "vocabulary file")), set(special_tokens), vocab_path)
    text = read_text(require_file(merges_path, "merges file"))
    # Not splitlines(), which also splits at characters that GPT-2 does not treat as line ends.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    return vocab, [parse_merge(line, merges_path) for line in lines if line]
