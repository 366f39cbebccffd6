"""Files that are either whole or absent: written under a temporary name, synced, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import UserError


def _temporary_name(path: Path) -> Path:
    # In the same folder, because a rename is atomic only within one file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    # Without this a crash of the machine can forget the rename itself.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends, and is removed when the block raises.

    An existing file at `path` is replaced only then; missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and is removed when the block raises.

    `path` must not exist yet; missing parent folders are made.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        _sync_folder(temporary)
        temporary.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def require_file(path: Path | str, what: str, remedy: str = "") -> Path:
    """Return `path` if it is a file with something in it; else raise a `UserError` that names it and says what to do."""
    path = Path(path)
    advice = f": {remedy}" if remedy else ""
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist{advice}" if not path.exists() else f"{what} {path} is not a file")
    if path.stat().st_size == 0:
        raise UserError(f"{what} {path} is empty{advice}")
    return path


def require_absent(path: Path | str, remedy: str = "remove it or name another with --out") -> Path:
    """Return `path` if nothing stands there; else raise a `UserError`, so that nothing is overwritten."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: {remedy}")
    return path
