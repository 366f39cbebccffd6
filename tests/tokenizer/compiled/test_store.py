"""The cache of machine code on disk: lookup, storage, integrity and removal."""

import os
import time
from pathlib import Path

import pytest

from tilewright.tokenizer.compiled import store


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Two folders for machine code; the first one is preferred."""
    places = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(store, "machine_code_folders", lambda: places)
    return places


def test_saved_code_is_loaded_for_the_same_cpu(folders):
    assert not store.is_cached("scanner.scan")
    assert store.load("scanner.scan", "cpu") is None
    store.save("scanner.scan", "cpu", b"code")
    assert store.load("scanner.scan", "cpu") == b"code"
    assert store.load("scanner.scan", "another") is None
    assert store.is_cached("scanner.scan")
    assert not store.is_cached("scanner.sca")
    assert store.writable_folder().parent == folders[0]
    assert not folders[1].exists()


def test_folders_that_are_not_writable_are_skipped(folders):
    folders[0].write_text("a file in place of a folder")
    store.save("scan", "cpu", b"code")
    assert store.writable_folder().parent == folders[1]
    assert store.load("scan", "cpu") == b"code"
    folders[0].unlink()
    # Code in the second folder is still found if another folder comes first.
    assert store.load("scan", "cpu") == b"code"


def test_saving_without_a_writable_folder_does_nothing(folders):
    for folder in folders:
        folder.write_text("")
    store.save("scan", "cpu", b"code")
    assert store.load("scan", "cpu") is None
    assert store.writable_folder() is None


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_folders_writable_by_others_are_ignored(folders, mode):
    store.save("scan", "cpu", b"code")
    place = store.writable_folder()
    place.chmod(mode)
    assert store.load("scan", "cpu") is None
    assert not store.is_cached("scan")
    assert store.writable_folder().parent == folders[1]


def test_symbolic_links_are_ignored(folders, tmp_path):
    store.save("scan", "cpu", b"code")
    place = store.writable_folder()
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    assert store.load("scan", "cpu") is None


def test_damaged_code_is_ignored(folders):
    store.save("scan", "cpu", b"code")
    [path] = store.writable_folder().iterdir()
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content[:-1] + b"x"):
        path.write_bytes(damaged)
        assert store.load("scan", "cpu") is None


def test_the_version_covers_all_sources_of_the_package(monkeypatch):
    seen = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path.name) or b"")
    before = store._version.__wrapped__()
    assert {"unicode_classes.py", "scanner.py", "decoder.py", "jit.py"} <= {*seen}
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"changed")
    assert store._version.__wrapped__() != before
    monkeypatch.setattr(store, "version", lambda package: "0.1")
    changed = store._version.__wrapped__()
    monkeypatch.setattr(store, "version", lambda package: "0.2")
    assert store._version.__wrapped__() != changed


def test_folders_of_old_versions_are_removed(folders):
    for age in range(8):
        old = folders[0] / f"machine-code-{age}"
        old.mkdir(parents=True)
        os.utime(old, (time.time() - 100 * (age + 1),) * 2)
    (folders[0] / "something else").mkdir()
    store.save("scan", "cpu", b"code")
    kept = {folder.name for folder in folders[0].iterdir()}
    assert kept == {store.writable_folder().name, "something else", *(f"machine-code-{age}" for age in range(4))}
