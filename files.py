"""Write files atomically: under a temporary name, synced, then renamed."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

# Errors of a write that the path does not cause: a full disk, a quota, a process limit, a broken disk.
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def temporary_name(path: Path) -> Path:
    """Return the temporary name for writing `path` in this process: `.NAME.PID.tmp` in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and sync them so that they survive a crash of the machine."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync every file and folder in `temporary`, then rename it to `path`, which must not exist."""
    for folder, _, files in os.walk(temporary, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))
    temporary.rename(path)
    # Without this, a crash of the machine can undo the rename.
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: a kill in the middle leaves only a `.*.tmp` folder.

    The same holds for a file that cannot be removed yet, such as one that another process reads over NFS.
    """
    temporary = temporary_name(path)
    path.rename(temporary)
    sync(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add `path` to an `OSError` of a write that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Turn an error for a path that is not writable into a `UserError` that names `path`, not the temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno in WRITE_ERRORS:
            raise
        reason = f"{error.filename} is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"cannot write {path}: {reason}") from None


@contextmanager
def locked_folder(folder: Path, waiting_for: str) -> Iterator[None]:
    """Hold an exclusive lock on `folder`; print `waiting for ...` to stderr if another process holds it."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {waiting_for}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"cannot lock {folder}: {error.strerror}; choose a folder on another disk") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends, and is removed when the block raises.

    An existing file at `path` is replaced only at the end. Missing parent folders are made. A path that is not writable
    raises a `UserError`.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with refused_writes(path):
        make_folder(path.parent)
        file = temporary.open("w+b")
    try:
        with named_errors(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with refused_writes(path):
            temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and is removed when the block raises.

    `path` must not exist. Missing parent folders are made.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    make_folder(path.parent)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def require_file(path: Path | str, what: str, remedy: str = "") -> Path:
    """Return `path` if it is a file that is not empty; otherwise raise a `UserError` that includes `remedy`."""
    path = Path(path)
    advice = f": {remedy}" if remedy else ""
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist{advice}" if not path.exists() else f"{what} {path} is not a file")
    if path.stat().st_size == 0:
        raise UserError(f"{what} {path} is empty{advice}")
    return path


def read_text(path: Path | str, what: str, remedy: str = "") -> str:
    """Return the text of a file that passes `require_file`, without a byte order mark.

    A file that is not UTF-8 raises a `UserError`.
    """
    path = require_file(path, what, remedy)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not in UTF-8, from byte {error.start} on: convert it") from None


def require_absent(path: Path | str, remedy: str = "remove it or name another with --out") -> Path:
    """Return `path` if it does not exist; otherwise raise a `UserError`, so that nothing is overwritten."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: {remedy}")
    return path
