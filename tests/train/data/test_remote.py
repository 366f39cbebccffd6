"""Fetching of remote files from a web server on localhost and from a file system in memory."""

import multiprocessing
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

import fsspec
from web_server import Site, serving

from tilewright.errors import UserError
from tilewright.train.data import remote
from tilewright.train.data.remote import local, url_of

CONTENT = bytes(range(256)) * 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        site.files["/data/train.txt"] = CONTENT
        yield site


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    filesystem = fsspec.filesystem("memory")
    for number in range(3):
        filesystem.pipe(f"/bucket/shards/{number}.tokens", bytes([number]) * 100)
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def gets(site: Site) -> int:
    return sum(method == "GET" for method, _, _ in site.requests)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


class TestUrlOf:
    @pytest.mark.parametrize("url", ["s3://b/x.txt", "https://h.org/a/b?c=d", "hf://datasets/o/n/x.parquet", "gs://b/*.tokens"])
    def test_of_remote_paths(self, url: str) -> None:
        assert url_of(Path(url)) == url_of(url) == url

    @pytest.mark.parametrize("path", ["data/train.txt", "/s3/b", "s3", "c:/data", "data/s3:/b", "file:/x"])
    def test_of_local_paths_is_none(self, path: str) -> None:
        assert url_of(Path(path)) is None
        assert local(Path(path)) == Path(path)


class TestWeb:
    def test_a_file_is_fetched_once(self, site: Site) -> None:
        first = local(Path(f"{site.url}/data/train.txt"))
        assert (first.name, first.read_bytes()) == ("train.txt", CONTENT)
        assert local(Path(f"{site.url}/data/train.txt")) == first
        assert gets(site) == 1

    def test_a_changed_file_is_fetched_again(self, site: Site) -> None:
        path = Path(f"{site.url}/data/train.txt")
        local(path)
        site.files["/data/train.txt"] = CONTENT[::-1]
        assert local(path).read_bytes() == CONTENT[::-1]

    @pytest.mark.parametrize("ranges", [True, False])
    def test_broken_connections_are_retried(self, site: Site, ranges: bool) -> None:
        site.cuts, site.ranges = 3, ranges
        assert local(Path(f"{site.url}/data/train.txt")).read_bytes() == CONTENT
        assert site.cuts == 0

    @pytest.fixture
    def interrupted(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The path of a file after 1000 bytes were fetched."""

        def broken(filesystem: object, file: object, out: BinaryIO, bar: object) -> None:
            out.write(CONTENT[: 1000 - out.tell()])
            raise ConnectionError("cut")

        path = Path(f"{site.url}/data/train.txt")
        with monkeypatch.context() as patch:
            patch.setattr(remote, "_append", broken)
            with pytest.raises(UserError, match=r"cannot read .*train\.txt: cut; the same command resumes"):
                local(path)
        site.requests.clear()
        return path

    def test_an_interrupted_fetch_resumes(self, site: Site, interrupted: Path) -> None:
        assert local(interrupted).read_bytes() == CONTENT
        assert [span for method, _, span in site.requests if method == "GET"] == [f"bytes=1000-{len(CONTENT) - 1}"]

    def test_a_resumed_fetch_does_not_mix_versions(self, site: Site, interrupted: Path, cache: Path) -> None:
        site.files["/data/train.txt"] = CONTENT[::-1]
        assert local(interrupted).read_bytes() == CONTENT[::-1]
        assert not list(cache.rglob("*.part"))

    ANSWERS = (
        (404, r"/other\.txt does not exist"),
        (403, r"/other\.txt: access is denied"),
        (503, r"cannot read .*/other\.txt: "),
    )

    @pytest.mark.parametrize(("status", "message"), ANSWERS)
    def test_errors_of_the_server(self, site: Site, status: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(site, "answer", lambda path: (status, {}, b""))
        with pytest.raises(UserError, match=message):
            local(Path(f"{site.url}/other.txt"))

    def test_a_glob_is_rejected(self, site: Site) -> None:
        with pytest.raises(UserError, match="web servers do not list files"):
            local(Path(f"{site.url}/data/*.txt"))

    def test_a_complete_copy_is_used_without_a_server(self, capsys: pytest.CaptureFixture[str]) -> None:
        with serving(Site()) as site:
            site.files["/a.txt"] = CONTENT
            copy = local(Path(f"{site.url}/a.txt"))
        assert local(Path(f"{site.url}/a.txt")) == copy
        assert "using the copy" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"cannot read .*/b\.txt: "):
            local(Path(f"{site.url}/b.txt"))

    def test_a_disk_that_is_too_small(self, site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(cache.parent)._replace(free=1000)
        monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"it needs 0\.0 GB.*XDG_CACHE_HOME"):
            local(Path(f"{site.url}/data/train.txt"))
        assert gets(site) == 0

    def test_processes_fetch_a_file_once(self, site: Site) -> None:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=local, args=(Path(f"{site.url}/data/train.txt"),)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert gets(site) == 1


class TestFolders:
    @pytest.mark.parametrize("url", ["memory://bucket/shards", "memory://bucket/shards/*.tokens"])
    def test_become_folders(self, url: str, memory: fsspec.AbstractFileSystem) -> None:
        folder = local(Path(url))
        assert names(folder) == ["0.tokens", "1.tokens", "2.tokens"]
        memory.rm("/bucket/shards/1.tokens")
        memory.pipe("/bucket/shards/3.tokens", b"new")
        memory.pipe("/bucket/shards/0.tokens", b"changed")
        assert local(Path(url)) == folder
        assert names(folder) == ["0.tokens", "2.tokens", "3.tokens"]
        assert (folder / "0.tokens").read_bytes() == b"changed"

    def test_only_missing_files_are_fetched(self, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = local(Path("memory://bucket/shards"))
        (folder / "2.tokens").unlink()
        fetched: list[str] = []
        real = remote._fetch

        def counted(filesystem: object, file: remote._File, copy: Path) -> None:
            fetched.append(copy.name)
            real(filesystem, file, copy)

        monkeypatch.setattr(remote, "_fetch", counted)
        local(Path("memory://bucket/shards"))
        assert fetched == ["2.tokens"]

    def test_an_incomplete_folder_is_not_used_without_a_network(
        self, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = remote._fetch

        def broken(filesystem: object, file: remote._File, copy: Path) -> None:
            if copy.name == "2.tokens":
                raise ConnectionError("cut")
            real(filesystem, file, copy)

        with monkeypatch.context() as patch:
            patch.setattr(remote, "_fetch", broken)
            with pytest.raises(UserError, match="cut"):
                local(Path("memory://bucket/shards"))
            patch.setattr(remote, "_open_filesystem", lambda url: 1 / 0)
            with pytest.raises(UserError, match="cannot read"):
                local(Path("memory://bucket/shards"))
        assert names(local(Path("memory://bucket/shards"))) == ["0.tokens", "1.tokens", "2.tokens"]

    def test_an_empty_glob(self, memory: fsspec.AbstractFileSystem) -> None:
        with pytest.raises(UserError, match="has no files"):
            local(Path("memory://bucket/*.txt"))

    def test_two_files_of_one_name(self, memory: fsspec.AbstractFileSystem) -> None:
        memory.pipe("/bucket/other/0.tokens", b"x")
        with pytest.raises(UserError, match="same name"):
            local(Path("memory://bucket/**/*.tokens"))


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"cannot read s3://b/x: .*s3fs"):
        local(Path("s3://b/x"))


def test_error_names_the_file_on_a_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*\.part"):
        local(Path(f"{site.url}/data/train.txt"))
