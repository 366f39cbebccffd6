"""Machine code on disk: a file for each function and CPU, in a folder for these sources, this Numba and this Python.

What is loaded is run, so only a folder that nobody else can write to is read.
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
# Folders of other sources or versions that stay beside the one in use, as two checkouts may share a place.
_OTHERS_KEPT = 4
_DIGEST_BYTES = 32


def is_kept(function: str) -> bool:
    """Whether there is machine code of a function; not whether this very CPU can run it, which Numba would have to say."""
    return any(next(folder.glob(f"{function}-*{_SUFFIX}"), None) for folder in _folders() if is_private(folder))


def load(function: str, cpu: str) -> bytes | None:
    """Return what was saved, or None where nothing was, or where it is damaged."""
    for folder in filter(is_private, _folders()):
        with suppress(OSError):
            content = _path(folder, function, cpu).read_bytes()
            if hashlib.sha256(content[_DIGEST_BYTES:]).digest() == content[:_DIGEST_BYTES]:
                return content[_DIGEST_BYTES:]
    return None


def save(function: str, cpu: str, code: bytes) -> None:
    """Keep the code in the first folder that takes it, or nowhere: that costs the next start its time, not this its result."""
    for folder in _folders():
        if make_private(folder):
            with suppress(OSError):
                with atomic_file(_path(folder, function, cpu)) as file:
                    file.write(hashlib.sha256(code).digest() + code)
                _forget_others(folder)
                return


def place() -> Path | None:
    """Return the folder that takes what is compiled, or None where no folder does."""
    return next(filter(make_private, _folders()), None)


def gather(folder: Path) -> int:
    """Copy what other folders keep to this one, so that it can be shipped; return how many functions it had not."""
    kept = {path.name: path for other in filter(is_private, _folders()) for path in other.glob(f"*{_SUFFIX}")}
    missing = [name for name in kept if not (folder / name).exists()]
    for name in missing:
        with atomic_file(folder / name) as file:
            file.write(kept[name].read_bytes())
    return len(missing)


def _folders() -> list[Path]:
    return [folder / f"machine-code-{_version()}" for folder in machine_code_folders()]


def _path(folder: Path, function: str, cpu: str) -> Path:
    return folder / f"{function}-{cpu}{_SUFFIX}"


@cache
def _version() -> str:
    """Return a digest of all that machine code depends on but the CPU.

    All sources of the tokenizer are among it, because helpers and constants of other files are part of the code of a function.
    """
    digest = hashlib.sha256(f"{version('numba')} {version('llvmlite')} {sys.implementation.cache_tag}".encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _forget_others(folder: Path) -> None:
    others = [each for each in folder.parent.glob("machine-code-*") if each != folder]
    for each in sorted(others, key=lambda each: each.stat().st_mtime)[:-_OTHERS_KEPT]:
        shutil.rmtree(each, ignore_errors=True)
