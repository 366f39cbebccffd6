"""Token shards: several token files that are read as one, in the order of their index or of their names.

The ids form one stream: a window may cross from one shard to the next.

    fineweb.tokens/
        000_00000.parquet.tokens
        000_00001.parquet.tokens
        index.json                 the order and the contents of the shards
"""

import glob
import hashlib
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...files import make_folder, refused_writes, require_file, write_text
from .token_file import DTYPES, TokenDataset

INDEX_FILE, ENDING = "index.json", ".tokens"
_FORMAT = "tilewright-token-shards-1"


class ShardedDataset(TokenDataset):
    """The concatenated ids of several token files. Files are opened for each read, so that no handles stay open."""

    def __init__(self, path: Path, shards: Sequence[TokenDataset]) -> None:
        """Join one or more `shards` under the name `path`. Raises a `UserError` if tokenizers or record types differ."""
        self.path, self._shards = path, tuple(shards)
        first = self._shards[0]
        for shard in self._shards:
            for name, what in {"tokenizer": "tokenizer", "vocab_size": "vocabulary", "dtype": "kind of records"}.items():
                if getattr(shard.header, name) != getattr(first.header, name):
                    raise UserError(f"{shard.path} has another {what} than {first.path}; name them as two sources")
        headers = [shard.header for shard in self._shards]
        self._offsets = np.cumsum([0, *(header.num_tokens for header in headers)]).tolist()
        self._dtype = DTYPES[first.header.dtype]
        self.header = replace(
            first.header,
            num_tokens=self._offsets[-1],
            sha256=hashlib.sha256("".join(header.sha256 for header in headers).encode()).hexdigest(),
            text_bytes=sum(header.text_bytes for header in headers),
            text_sha256="",
            text_file=None,
        )
        """The header of the concatenated ids. `sha256` is the hash of the shards' hashes, and `text_file` is None."""

    @property
    def files(self) -> tuple[TokenDataset, ...]:
        """The shards in order."""
        return self._shards

    def spans(self, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return the same as `TokenDataset.spans`. A span may cross from one shard to the next."""
        self._require_inside(starts, sizes)
        parts: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        place = 0
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            shard = bisect_right(self._offsets, start) - 1
            while size:
                here = min(size, self._offsets[shard + 1] - start)
                parts[shard].append((start - self._offsets[shard], here, place))
                start, size, place, shard = start + here, size - here, place + here, shard + 1
        found = np.empty(place, self._dtype)
        # Opens each shard once for all its spans.
        for shard, spans in parts.items():
            inside, counts, places = np.array(spans).T
            records, done = self._shards[shard].spans(inside, counts), 0
            for count, place in zip(counts.tolist(), places.tolist(), strict=True):
                found[place : place + count] = records[done : done + count]
                done += count
        return found

    def verify(self, after_piece: Callable[[int], object] | None = None) -> None:
        """Verify each shard."""
        for shard in self._shards:
            shard.verify(after_piece)


def find_shards(path: Path) -> list[Path] | None:
    """Return the token files of a folder, an index or a glob, in order; None for texts."""
    if path.name == INDEX_FILE:
        return _shards_in_index(path)
    if path.is_dir():
        return _shards_in_index(path / INDEX_FILE) if (path / INDEX_FILE).exists() else _shards_in_folder(path)
    if path.exists() or not glob.has_magic(str(path)):
        return None
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    shards = [each for each in found if each.suffix == ENDING and each.is_file()]
    if shards and len(shards) < len(found):
        other = next(each for each in found if each not in shards)
        raise UserError(f"{path} matches token files and {other}; name token files only, such as '{path.parent}/*{ENDING}'")
    return shards or None


def _shards_in_folder(folder: Path) -> list[Path] | None:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    shards = [path for path in files if path.suffix == ENDING]
    # A folder of texts may contain their token files; a folder of shards may contain .json files.
    if shards and (others := [path for path in files if path.suffix not in (ENDING, ".json")]):
        raise UserError(
            f"{folder} has token files and {others[0].name}; name files of one kind, such as '{folder}/*{ENDING}' or "
            f"'{folder}/*{others[0].suffix}'"
        )
    return shards or None


def _shards_in_index(index: Path) -> list[Path]:
    entries = _read_index(index)
    shards = [index.with_name(name) for name in entries]
    for shard in shards:
        require_file(shard, f"token file of {index},", "encode its text again")
    return shards


def check_index(shards: Sequence[TokenDataset]) -> None:
    """Raise a `UserError` if a shard differs from its entry in the index of its folder. A folder may have no index."""
    indices = {folder: folder / INDEX_FILE for folder in {shard.path.parent for shard in shards}}
    entries = {folder: _read_index(index) if index.exists() else {} for folder, index in indices.items()}
    for shard in shards:
        known = entries[shard.path.parent].get(shard.path.name)
        if known not in (None, shard.header.sha256):
            raise UserError(f"{shard.path} is not the shard listed in {indices[shard.path.parent]}; encode its text again")


def _read_index(index: Path) -> dict[str, str | None]:
    """Return the hash of each shard's ids by shard name, in order; None for a shard that is not encoded yet."""
    try:
        values: dict[str, Any] = json.loads(require_file(index, "index of token shards").read_text())
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        entries = {str(entry["name"]): entry["sha256"] for entry in values["shards"]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{index} is not an index of token shards: {error!r}; encode the texts again") from error
    if not entries or any(Path(name).name != name for name in entries):
        raise UserError(f"{index} is not an index of token shards: it lists no file, or a file of another folder")
    return entries


def announce_shards(folder: Path, names: Sequence[str]) -> None:
    """Write an index of the names of the shards to encode, so that an incomplete folder cannot be opened."""
    with refused_writes(folder):
        make_folder(folder)
    _write_index(folder, {"format": _FORMAT, "shards": [{"name": name, "sha256": None} for name in names]})


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    path, text = folder / INDEX_FILE, json.dumps(index, indent=1) + "\n"
    # Does not write an unchanged index, because the folder may be read-only.
    if not path.exists() or path.read_text() != text:
        with refused_writes(folder):
            write_text(path, text)


def write_index(folder: Path, shards: Sequence[TokenDataset]) -> None:
    """Write the index of the shards in a folder, in the given order."""
    entries = [
        {
            "name": shard.path.name,
            "num_tokens": shard.header.num_tokens,
            "sha256": shard.header.sha256,
            "text_bytes": shard.header.text_bytes,
            "text_sha256": shard.header.text_sha256,
            "text_file": None if shard.header.text_file is None else asdict(shard.header.text_file),
        }
        for shard in shards
    ]
    header = shards[0].header
    index = {
        "format": _FORMAT,
        "tokenizer": header.tokenizer,
        "vocab_size": header.vocab_size,
        "num_tokens": sum(shard.header.num_tokens for shard in shards),
        "shards": entries,
    }
    _write_index(folder, index)
