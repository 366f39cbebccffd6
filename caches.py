"""Where this user's caches are: the tokenizer's machine code, asked for by its compiler and by the doctor, and remote files.

It needs no package, because the doctor runs where they are missing.
"""

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).parent


def machine_code_folders() -> list[Path]:
    """Return the folders that machine code is looked for in; the first that can be written to takes what is compiled.

    They are the one that NUMBA_CACHE_DIR names, the package's own, the user's cache, and one under the temporary folder,
    which is there where a container has a read-only package and a user without a home.
    """
    folders = [Path(os.environ["NUMBA_CACHE_DIR"])] if os.environ.get("NUMBA_CACHE_DIR") else []
    folders.append(_PACKAGE / "tokenizer" / "compiled" / "__pycache__")
    return [*folders, *_user_caches(), temporary_folder()]


def user_cache() -> Path:
    """Return the folder of this user's caches, or one under the temporary folder where the user has no home."""
    return next(iter(_user_caches()), temporary_folder())


def _user_caches() -> list[Path]:
    try:
        if sys.platform == "darwin":
            return [Path.home() / "Library" / "Caches" / "tilewright"]
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright"]
    except RuntimeError:  # a user whom the system does not know has no home
        return []


def temporary_folder() -> Path:
    """Return the folder of this user under the system's temporary one."""
    return Path(tempfile.gettempdir(), f"tilewright-{os.getuid() if hasattr(os, 'getuid') else 'user'}")


def is_private(folder: Path) -> bool:
    """Whether a folder is there that nobody writes to but this user, root, and who owns the package: that code is run anyway.

    A link is none, as who made it may turn it elsewhere.
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
    """Make a folder that only this user writes to, and others read unless it is temporary; return whether it is there."""
    mode = 0o700 if temporary_folder() in (folder, *folder.parents) else 0o755
    try:
        if folder.parent == temporary_folder() and not make_private(folder.parent):
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode)
            # As a mask would have it otherwise: group members may not write, and those who use an image may read.
            folder.chmod(mode)
        # Not os.access, which promises root what a read-only disk does not keep.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return is_private(folder)
