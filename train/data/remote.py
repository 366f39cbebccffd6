"""Remote files (https, s3, gs, az, hf), copied to the user's cache with fsspec."""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import dacite
from tqdm import tqdm

from ...caches import user_cache
from ...errors import UserError, one_line
from ...files import WRITE_ERRORS, locked_folder, make_folder, named_errors, refused_writes, write_text

# The package that fsspec needs for each protocol.
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
# "memory" is a file system of fsspec for tests. `Path` drops one of the two slashes of a URL.
_URL = re.compile(rf"({'|'.join([*_PACKAGES, 'memory'])}):/+(.+)")
# The names of the version of a file on different servers, in order of preference.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "mtime", "created")

_READ_BYTES = 1 << 24
_ATTEMPTS = 5


@dataclass(frozen=True)
class _File:
    """A remote file with the size and version that the server reports."""

    place: str
    size: int | None
    version: str


@dataclass
class _Record:
    """The contents of a cache folder: files by local name."""

    url: str
    is_file: bool
    """Whether the URL names a file, not a folder or a glob."""
    files: dict[str, _File] = field(default_factory=dict)
    complete: bool = False


class _Unreachable(UserError):
    """The server does not answer, or answers with an unexpected error."""


def url_of(path: Path | str) -> str | None:
    """Return the URL in a path, or None for a local path. `Path("s3://b/x")` becomes `s3:/b/x`; both forms are accepted."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def local(path: Path) -> Path:
    """Return a local path itself, or the local copy of a remote path. Fetches missing files to the user's cache.

    The copy of a folder or a glob is a folder; web servers support neither. The size and version (such as the ETag) that the
    server reports decide whether a copy is current; changed files are fetched again. If the server does not answer, a complete
    copy is used. An interrupted fetch resumes. Raises a `UserError` if a file is missing or access is denied, if the disk is
    too small, or if a package is not installed.
    """
    if (url := url_of(path)) is None:
        return path
    folder = user_cache() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    with refused_writes(folder):
        make_folder(folder)
    with locked_folder(folder, f"another process that fetches {url}"):
        return _update(url, folder)


def _update(url: str, folder: Path) -> Path:
    record = _read_record(folder)
    try:
        with _named_errors(url):
            filesystem, place = _open_filesystem(url)
            wanted = _list_files(filesystem, place, url)
    except _Unreachable as error:
        if record is None or not record.complete:
            raise
        tqdm.write(f"{error}; using the copy in {folder}", file=sys.stderr)
        wanted = record
    else:
        held = record.files if record else {}
        for name in held.keys() - wanted.files.keys():
            (folder / name).unlink(missing_ok=True)
        present = {name: file for name, file in wanted.files.items() if held.get(name) == file and (folder / name).exists()}
        missing = {name: file for name, file in wanted.files.items() if name not in present}
        _require_space(url, folder, missing)
        now = _Record(url, wanted.is_file, present)
        for name, file in missing.items():
            with _named_errors(url):
                _fetch(filesystem, file, folder / name)
            now.files[name] = file
            _write_record(folder, now)
        if record is None or not record.complete or missing or held.keys() != wanted.files.keys():
            _write_record(folder, wanted)
    return folder / next(iter(wanted.files)) if wanted.is_file else folder


def _record_file(folder: Path) -> Path:
    return folder / ".files.json"


def _read_record(folder: Path) -> _Record | None:
    try:
        return dacite.from_dict(_Record, json.loads(_record_file(folder).read_bytes()))
    except (OSError, ValueError, dacite.DaciteError):
        return None


def _write_record(folder: Path, record: _Record) -> None:
    write_text(_record_file(folder), json.dumps(asdict(record), indent=1))


def _open_filesystem(url: str) -> tuple[Any, str]:
    scheme = url.partition(":")[0]
    try:
        from fsspec.core import url_to_fs

        # No cached listings: another process may have changed the folder.
        options: dict[str, Any] = {"use_listings_cache": False} if scheme in ("s3", "gs", "az", "hf") else {}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"cannot read {url}: {one_line(error)}; pip install fsspec {_PACKAGES.get(scheme)}") from None


def _list_files(filesystem: Any, place: str, url: str) -> _Record:
    web = url.startswith("http")
    if web and "*" in url:
        raise UserError(f"{url} is a glob: web servers do not list files; name each file")
    # In an http URL, a question mark begins a query.
    if not web and re.search(r"[*?[]", url):
        places = filesystem.glob(place)
    elif not web and filesystem.isdir(place):
        places = filesystem.find(place)
    else:
        name = url.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
        return _Record(url, True, {name: _describe(filesystem, place)}, complete=True)
    files = {each.rsplit("/", 1)[-1]: each for each in sorted(places)}
    if not files:
        raise UserError(f"{url} has no files")
    if len(files) < len(places):
        raise UserError(f"{url} has files of the same name in different folders; name one folder")
    return _Record(url, False, {name: _describe(filesystem, each) for name, each in files.items()}, complete=True)


def _describe(filesystem: Any, place: str) -> _File:
    info = filesystem.info(place)
    return _File(place, info.get("size"), next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


def _fetch(filesystem: Any, file: _File, copy: Path) -> None:
    # The name contains the version, so that a resumed fetch never mixes two versions.
    version = hashlib.sha256(f"{file.size} {file.version}".encode()).hexdigest()[:16]
    part = copy.with_name(f".{copy.name}.{version}.part")
    for other in copy.parent.iterdir():
        if other != part and re.fullmatch(rf"\.{re.escape(copy.name)}\.[0-9a-f]{{16}}\.part", other.name):
            other.unlink()
    with named_errors(part), part.open("ab") as out:
        if file.size is None:
            # A server that does not report a size cannot resume.
            out.truncate(0)
        _read_to_end(filesystem, file, out, copy.name)
        os.fsync(out.fileno())
        if file.size not in (None, out.tell()) or (file.version and _describe(filesystem, file.place) != file):
            raise UserError(f"cannot fetch {file.place}: it changed in the meantime; fetch it again")
    part.replace(copy)


def _read_to_end(filesystem: Any, file: _File, out: BinaryIO, name: str) -> None:
    """Append the missing bytes to `out`. Gives up after `_ATTEMPTS` consecutive connections without a new byte."""
    failures = 0
    with tqdm(desc=f"fetching {name}", total=file.size, initial=out.tell(), unit="B", unit_scale=True, disable=None) as bar:
        while file.size is None or out.tell() < file.size:
            before = out.tell()
            try:
                _append(filesystem, file, out, bar)
                if file.size is None:
                    return
                error: Exception = ConnectionError(f"the connection ended after {out.tell()} of {file.size} bytes")
            except Exception as caught:
                if not _is_network_error(caught) or file.size is None:
                    raise
                if isinstance(caught, ValueError):
                    # fsspec raises ValueError if a web server does not support range requests.
                    out.truncate(0)
                    out.seek(0)
                error = caught
            failures = failures + 1 if out.tell() == before else 1
            if out.tell() < file.size:
                if failures == _ATTEMPTS:
                    raise error
                time.sleep(2 ** (failures - 1))


def _append(filesystem: Any, file: _File, out: BinaryIO, bar: Any) -> None:
    # A whole file from a web server takes one request; a resumed file takes one request per block.
    block_size = 0 if file.place.startswith("http") and not out.tell() else _READ_BYTES
    with filesystem.open(file.place, "rb", cache_type="none", block_size=block_size) as remote:
        if out.tell():
            remote.seek(out.tell())
        while data := remote.read(_READ_BYTES):
            out.write(data)
            bar.update(len(data))
            # Flushes, so that a killed process loses no received bytes.
            out.flush()


def _require_space(url: str, folder: Path, files: dict[str, _File]) -> None:
    size, free = sum(file.size or 0 for file in files.values()), shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"cannot fetch {url}: it needs {size / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB free; free "
            "some space, or set XDG_CACHE_HOME to a folder on another disk"
        )


def _is_network_error(error: Exception) -> bool:
    # The packages behind fsspec share no base class for network errors. Other errors have a class of their own.
    if isinstance(error, FileNotFoundError | PermissionError | UserError):
        return False
    return not isinstance(error, OSError) or error.errno not in WRITE_ERRORS


def _cause_of(error: Exception) -> Exception:
    """Return the actual error of a web server. fsspec raises FileNotFoundError for any status, and without an answer."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = getattr(cause, "status", None)
    return PermissionError(str(cause)) if status in (401, 403) else error if status in (404, 410) else cause


@contextmanager
def _named_errors(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as caught:
        error = _cause_of(caught)
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{url} does not exist") from None
        if isinstance(error, PermissionError):
            raise UserError(f"cannot read {url}: access is denied ({one_line(error)})") from None
        if not _is_network_error(error):
            raise
        raise _Unreachable(f"cannot read {url}: {one_line(error)}; the same command resumes the fetch") from error
