"""The folders of this user's caches: the tokenizer's machine code, and remote files.

The module imports no third-party package: `tilewright doctor` uses it when packages are missing.
"""

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).parent


def machine_code_folders() -> list[Path]:
    """Return the folders to search for machine code; the first writable one stores new code.

    They are `NUMBA_CACHE_DIR`, the package's own folder, the user's cache, and a folder in the temporary directory. The last
    one serves a container with a read-only package and a user without a home.
    """
    folders = [Path(os.environ["NUMBA_CACHE_DIR"])] if os.environ.get("NUMBA_CACHE_DIR") else []
    folders.append(_PACKAGE / "tokenizer" / "compiled" / "__pycache__")
    return [*folders, *_user_caches(), temporary_folder()]


def user_cache() -> Path:
    """Return this user's cache folder, or one in the temporary directory if the user has no home."""
    return next(iter(_user_caches()), temporary_folder())


def _user_caches() -> list[Path]:
    try:
        if sys.platform == "darwin":
            return [Path.home() / "Library" / "Caches" / "tilewright"]
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright"]
    except RuntimeError:  # a user without an entry in the password database has no home
        return []


def temporary_folder() -> Path:
    """Return this user's folder in the system's temporary directory."""
    return Path(tempfile.gettempdir(), f"tilewright-{os.getuid() if hasattr(os, 'getuid') else 'user'}")


def is_private(folder: Path) -> bool:
    """Return whether only this user, root or the package's owner can write to a folder: all run code on this machine.

    A symbolic link is not private, because its owner can redirect it.
    """
    try:
        found = folder.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return False
    if not hasattr(os, "getuid"):
        return True
    return found.st_uid in _owners() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _owners() -> set[int]:
    return {os.getuid(), 0, _PACKAGE.stat().st_uid}


def make_private(folder: Path) -> bool:
    """Make a folder that only this user can write to; return whether it exists, is private and writable.

    Others can read it, except in the temporary directory.
    """
    mode = 0o700 if temporary_folder() in (folder, *folder.parents) else 0o755
    try:
        if folder.parent == temporary_folder() and not make_private(folder.parent):
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode)
            # Override the umask: the group must not write, and users of an image must be able to read.
            folder.chmod(mode)
        # Not os.access: for root it reports a read-only disk as writable.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return is_private(folder)
