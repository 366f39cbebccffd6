"""Texts for the tokenizer bench: stories, files of installed Python packages, and lines without a break."""

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..tokenizer import END_OF_TEXT
from ..train.data.corpus import write_stories

LINES = ("dna", "aaaa", "cjk")
_SUFFIXES = (".md", ".rst", ".txt", ".py")


def package_files() -> Iterator[bytes]:
    """Yield the documentation and the sources of all installed packages, by path, without duplicates."""
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    paths = {path.resolve() for folder in folders for path in folder.rglob("*") if path.suffix in _SUFFIXES}
    seen: set[bytes] = set()
    for path in sorted(paths):
        content = path.read_bytes() if path.is_file() else b""
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            yield content


def write_packages(path: Path, megabytes: float) -> int:
    """Write the packages' files, up to `megabytes` MB, separated by a special token; return the size in bytes.

    Invalid UTF-8 becomes U+FFFD, because some libraries accept only valid text.
    """
    left = int(megabytes * 1e6)
    separator = END_OF_TEXT.encode()
    with path.open("wb") as file:
        for content in package_files():
            document = content.decode(errors="replace").encode()[:left].decode(errors="ignore").encode() + separator
            left -= file.write(document)
            if left <= 0:
                break
    return path.stat().st_size


def write_line(path: Path, kind: str, megabytes: float) -> int:
    """Write one line without word boundaries, of kind dna, aaaa or cjk; return its size in bytes."""
    rng = random.Random(0)
    size = int(megabytes * 1e6)
    if kind == "aaaa":
        text = "a" * size
    elif kind == "dna":
        text = "".join(rng.choices("acgt", k=size))
    else:
        # 3,000 characters with Zipf frequencies.
        characters = [chr(0x4E00 + index) for index in range(3000)]
        text = "".join(rng.choices(characters, [1 / rank for rank in range(1, 3001)], k=size // 3))
    return path.write_bytes(text.encode())


def write_text(path: Path, kind: str, megabytes: float) -> int:
    """Write a text of kind stories, packages, dna, aaaa or cjk; return the size in bytes."""
    if kind == "stories":
        return write_stories(path, megabytes)
    return write_packages(path, megabytes) if kind == "packages" else write_line(path, kind, megabytes)
