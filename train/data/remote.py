"""Remote files (https, s3, gs, az, hf): fetched once to the user's cache through fsspec, then used as local ones."""

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

# The package beside fsspec that reads each of them.
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub"}
# "memory" is fsspec's own, for tests. A path has lost one of the two slashes of a URL.
_URL = re.compile(rf"({'|'.join([*_PACKAGES, 'memory'])}):/+(.+)")
# What servers call the version of a file, the best first.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "mtime", "created")

_READ_BYTES = 1 << 24
_ATTEMPTS = 5


@dataclass(frozen=True)
class _File:
    """A remote file as its server describes it."""

    place: str
    size: int | None
    version: str


@dataclass
class _Record:
    """What a folder of the cache holds: the files by their names there."""

    url: str
    is_file: bool
    """Whether the URL is that of a file, not of a folder."""
    files: dict[str, _File] = field(default_factory=dict)
    complete: bool = False


class _Unreachable(UserError):
    """Nobody answers, or not as a server of files does."""


def url_of(path: Path | str) -> str | None:
    """Return the URL that a path stands for (`Path("s3://b/x")` is written `s3:/b/x`), or None for a local path."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def local(path: Path) -> Path:
    """Return a local path as it is, and for a remote one its copy in the user's cache, fetched where it is missing.

    The copy of a glob, or of a folder, is a folder of the files; a web server has neither. A copy is checked by the sizes and
    versions (ETag and the like) that the server tells; what has changed is fetched anew, and where nobody answers a complete
    copy is used as it is. An interrupted fetch goes on where it stopped. Raises a `UserError` where a file is missing or may
    not be read, where the disk is too small, and where a package is not installed.
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
            wanted = _listed(filesystem, place, url)
    except _Unreachable as error:
        if record is None or not record.complete:
            raise
        tqdm.write(f"{error}: the copy in {folder} is used", file=sys.stderr)
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

        # A listing is never taken from memory: another process may have written there since.
        options: dict[str, Any] = {"use_listings_cache": False} if scheme in ("s3", "gs", "az", "hf") else {}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{url} needs fsspec and {_PACKAGES.get(scheme)}: pip install them ({one_line(error)})") from None


def _listed(filesystem: Any, place: str, url: str) -> _Record:
    web = url.startswith("http")
    if web and "*" in url:
        raise UserError(f"{url} is a glob, and a web server has no list of its files: name each of them")
    # In the address of a web page a question mark begins a query.
    if not web and re.search(r"[*?[]", url):
        places = filesystem.glob(place)
    elif not web and filesystem.isdir(place):
        places = filesystem.find(place)
    else:
        name = url.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
        return _Record(url, True, {name: _described(filesystem, place)}, complete=True)
    files = {each.rsplit("/", 1)[-1]: each for each in sorted(places)}
    if not files:
        raise UserError(f"{url} holds no file")
    if len(files) < len(places):
        raise UserError(f"{url} holds files of the same name in different folders: name one folder")
    return _Record(url, False, {name: _described(filesystem, each) for name, each in files.items()}, complete=True)


def _described(filesystem: Any, place: str) -> _File:
    told = filesystem.info(place)
    return _File(place, told.get("size"), next((str(told[key]) for key in _VERSIONS if told.get(key)), ""))


def _fetch(filesystem: Any, file: _File, copy: Path) -> None:
    # The version is part of the name, so that no copy is put together from two.
    version = hashlib.sha256(f"{file.size} {file.version}".encode()).hexdigest()[:16]
    part = copy.with_name(f".{copy.name}.{version}.part")
    for other in copy.parent.iterdir():
        if other != part and re.fullmatch(rf"\.{re.escape(copy.name)}\.[0-9a-f]{{16}}\.part", other.name):
            other.unlink()
    with named_errors(part), part.open("ab") as out:
        if file.size is None:
            # A server that does not count its bytes cannot go on from one of them.
            out.truncate(0)
        _read_to_end(filesystem, file, out, copy.name)
        os.fsync(out.fileno())
        if file.size not in (None, out.tell()) or (file.version and _described(filesystem, file.place) != file):
            raise UserError(f"{file.place} changed while it was fetched: fetch it again")
    part.replace(copy)


def _read_to_end(filesystem: Any, file: _File, out: BinaryIO, name: str) -> None:
    """Append to `out` what it lacks; a connection that breaks is made again, `_ATTEMPTS` times without a new byte."""
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
                if not _is_of_network(caught) or file.size is None:
                    raise
                if isinstance(caught, ValueError):
                    # So fsspec says that a web server sends a file from its beginning or not at all.
                    out.truncate(0)
                    out.seek(0)
                error = caught
            failures = failures + 1 if out.tell() == before else 1
            if out.tell() < file.size:
                if failures == _ATTEMPTS:
                    raise error
                time.sleep(2 ** (failures - 1))


def _append(filesystem: Any, file: _File, out: BinaryIO, bar: Any) -> None:
    # A web server is asked for the whole file in one request, and for the rest of one in requests of a block each.
    block_size = 0 if file.place.startswith("http") and not out.tell() else _READ_BYTES
    with filesystem.open(file.place, "rb", cache_type="none", block_size=block_size) as remote:
        if out.tell():
            remote.seek(out.tell())
        while data := remote.read(_READ_BYTES):
            out.write(data)
            bar.update(len(data))
            # What has arrived outlives the process.
            out.flush()


def _require_space(url: str, folder: Path, files: dict[str, _File]) -> None:
    size, free = sum(file.size or 0 for file in files.values()), shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{url} needs {size / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB: free some, or set"
            " XDG_CACHE_HOME to a folder of another disk"
        )


def _is_of_network(error: Exception) -> bool:
    # The packages that fsspec calls share no class of errors, but what is missing, forbidden or of the disk has one.
    if isinstance(error, FileNotFoundError | PermissionError | UserError):
        return False
    return not isinstance(error, OSError) or error.errno not in WRITE_ERRORS


def _plain(error: Exception) -> Exception:
    """Return what a web server meant, where fsspec says of any answer, and of none, that the file was not found."""
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
        error = _plain(caught)
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{url} does not exist") from None
        if isinstance(error, PermissionError):
            raise UserError(f"{url} may not be read: {one_line(error)}") from None
        if not _is_of_network(error):
            raise
        raise _Unreachable(f"{url} cannot be read ({one_line(error)}); what was fetched so far is kept") from error
