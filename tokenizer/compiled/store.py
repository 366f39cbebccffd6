"""Machine code on disk: a file per function and CPU, in a folder for these sources, this Numba and this Python.

The code is executed after loading, so folders that other users can write to are ignored.
"""

import hashlib
import shutil
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from ...caches import is_private, machine_code_folders, make_private
from ...files import atomic_file

_SUFFIX = ".machinecode"
# Number of folders of other sources or versions to keep: two checkouts may share a cache.
_OTHERS_KEPT = 4
_DIGEST_BYTES = 32


def is_cached(function: str) -> bool:
    """Return whether machine code of a function exists; only Numba could check whether it fits this CPU."""
    return any(next(folder.glob(f"{function}-*{_SUFFIX}"), None) for folder in _folders() if is_private(folder))


def load(function: str, cpu: str) -> bytes | None:
    """Return saved code, or None if it is missing or damaged."""
    for folder in filter(is_private, _folders()):
        with suppress(OSError):
            content = _path(folder, function, cpu).read_bytes()
            if hashlib.sha256(content[_DIGEST_BYTES:]).digest() == content[:_DIGEST_BYTES]:
                return content[_DIGEST_BYTES:]
    return None


def save(function: str, cpu: str, code: bytes) -> None:
    """Store the code in the first writable folder. Without one, the next process compiles again."""
    for folder in _folders():
        if make_private(folder):
            with suppress(OSError):
                with atomic_file(_path(folder, function, cpu)) as file:
                    file.write(hashlib.sha256(code).digest() + code)
                _remove_old_versions(folder)
                return


def writable_folder() -> Path | None:
    """Return the folder that new code is stored in, or None if no folder is writable."""
    return next(filter(make_private, _folders()), None)


def collect(folder: Path) -> int:
    """Copy the code in other folders to `folder`, to ship it; return how many functions were missing."""
    stored = {path.name: path for other in filter(is_private, _folders()) for path in other.glob(f"*{_SUFFIX}")}
    missing = [name for name in stored if not (folder / name).exists()]
    for name in missing:
        with atomic_file(folder / name) as file:
            file.write(stored[name].read_bytes())
    return len(missing)


def _folders() -> list[Path]:
    return [folder / f"machine-code-{_version()}" for folder in machine_code_folders()]


def _path(folder: Path, function: str, cpu: str) -> Path:
    return folder / f"{function}-{cpu}{_SUFFIX}"


@cache
def _version() -> str:
    """Return a digest of everything that machine code depends on, except the CPU.

    It covers all sources of the tokenizer, because the code of a function includes helpers and constants of other files.
    """
    digest = hashlib.sha256(f"{version('numba')} {version('llvmlite')} {sys.implementation.cache_tag}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _remove_old_versions(folder: Path) -> None:
    others = [each for each in folder.parent.glob("machine-code-*") if each != folder]
    for each in sorted(others, key=lambda each: each.stat().st_mtime)[:-_OTHERS_KEPT]:
        shutil.rmtree(each, ignore_errors=True)
