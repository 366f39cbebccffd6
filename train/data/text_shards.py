"""A resumable writer of documents to one text file or to shards. Files appear only when they are complete."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...errors import UserError
from ...files import make_folder, named_errors, refused_writes, sync
from ...tokenizer import END_OF_TEXT
from ...tokenizer.text.utf8 import encode_utf8

_HASH_BYTES = 1 << 20


def document(text: str) -> bytes:
    """Return a document of a corpus in UTF-8: the text, then `END_OF_TEXT` on a separate line."""
    return encode_utf8(f"{text}\n{END_OF_TEXT}\n")


@dataclass
class Shard:
    """A file of a corpus: its path in the folder, and its contents."""

    name: str
    bytes: int = 0
    documents: int = 0
    sha256: str = hashlib.sha256().hexdigest()


@dataclass
class ShardsState:
    """The shards with their contents as of the last sync. The last shard is not complete yet."""

    shards: list[Shard] = field(default_factory=list)


class TextShards:
    """Writes `NAME.txt`, or `NAME/00000.txt`, `NAME/00001.txt`, ...; a shard ends with the document that reaches `shard_bytes`.

    Files have hidden names until they are published.
    """

    def __init__(self, folder: Path, name: str, shard_bytes: int | None, state: ShardsState, remedy: str):
        """Resume after `state`. Raises a `UserError` with the `remedy` if the files differ from it."""
        self._folder, self._name, self._shard_bytes = folder, name, shard_bytes
        self.state = state if state.shards else ShardsState([Shard(self._name_of(0))])
        self._unsaved: list[BinaryIO] = []
        with refused_writes(folder):
            make_folder((folder / self._name_of(0)).parent)
        self._publish_whole()
        self._file, self._digest = self._reopen(self.state.shards[-1], remedy)

    @property
    def size(self) -> int:
        """The number of bytes written."""
        return sum(shard.bytes for shard in self.state.shards)

    def write(self, data: bytes) -> None:
        """Append a document to the last shard, or begin a new shard with it."""
        shard = self.state.shards[-1]
        if self._shard_bytes is not None and shard.bytes >= self._shard_bytes:
            shard = self._begin_shard()
        with named_errors(self._part(shard)):
            self._file.write(data)
        self._digest.update(data)
        shard.bytes += len(data)
        shard.documents += 1

    def sync(self) -> ShardsState:
        """Sync all files to the disk and return their state."""
        for file in [*self._unsaved, self._file]:
            with named_errors(self._folder):
                file.flush()
                os.fsync(file.fileno())
        for file in self._unsaved:
            file.close()
        self._unsaved.clear()
        # Syncs the folder, so that a new file survives a crash of the machine.
        sync(self._part(self.state.shards[-1]).parent)
        self.state.shards[-1].sha256 = self._digest.hexdigest()
        return self.state

    def publish(self, last: bool = False) -> None:
        """Rename the complete shards to their final names, with `last` the last shard too. Call it after the state is saved."""
        self._publish_whole()
        if last:
            self._rename(self.state.shards[-1])

    def close(self) -> None:
        """Close the files without saving."""
        for file in [*self._unsaved, self._file]:
            file.close()

    def _name_of(self, number: int) -> str:
        return f"{self._name}.txt" if self._shard_bytes is None else f"{self._name}/{number:05}.txt"

    def _part(self, shard: Shard) -> Path:
        path = self._folder / shard.name
        return path.with_name(f".{path.name}.part")

    def _begin_shard(self) -> Shard:
        self.state.shards[-1].sha256 = self._digest.hexdigest()
        self._unsaved.append(self._file)
        shard = Shard(self._name_of(len(self.state.shards)))
        self.state.shards.append(shard)
        self._file, self._digest = self._part(shard).open("w+b"), hashlib.sha256()
        return shard

    def _publish_whole(self) -> None:
        for shard in self.state.shards[:-1]:
            self._rename(shard)

    def _rename(self, shard: Shard) -> None:
        # After a crash, the file may already have its final name.
        if (part := self._part(shard)).exists():
            part.replace(self._folder / shard.name)

    def _reopen(self, shard: Shard, remedy: str) -> "tuple[BinaryIO, hashlib._Hash]":
        part, digest = self._part(shard), hashlib.sha256()
        published = self._folder / shard.name
        path = published if shard.bytes and not part.exists() and published.exists() else part
        file = path.open("r+b" if path.exists() else "w+b")
        left = shard.bytes
        while left and (data := file.read(min(left, _HASH_BYTES))):
            digest.update(data)
            left -= len(data)
        if digest.hexdigest() != shard.sha256:
            file.close()
            raise UserError(f"{path} does not hold the {shard.bytes} bytes that were saved; {remedy}")
        file.seek(shard.bytes)
        if path == part:
            file.truncate()
        return file, digest
