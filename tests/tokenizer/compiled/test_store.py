"""Machine code on disk: what is read, from where, and what goes."""

import os
import time
from pathlib import Path

import pytest

from tilewright.tokenizer.compiled import store


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Two places for machine code, the first of which is preferred."""
    places = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(store, "machine_code_folders", lambda: places)
    return places


def test_what_is_saved_is_loaded_for_the_same_cpu(folders):
    assert not store.is_kept("scanner.scan")
    assert store.load("scanner.scan", "cpu") is None
    store.save("scanner.scan", "cpu", b"code")
    assert store.load("scanner.scan", "cpu") == b"code"
    assert store.load("scanner.scan", "another") is None
    assert store.is_kept("scanner.scan")
    assert not store.is_kept("scanner.sca")
    assert store.place().parent == folders[0]
    assert not folders[1].exists()


def test_what_cannot_be_written_to_is_passed_over(folders):
    folders[0].write_text("a file, which nobody can make a folder in")
    store.save("scan", "cpu", b"code")
    assert store.place().parent == folders[1]
    assert store.load("scan", "cpu") == b"code"
    folders[0].unlink()
    # Another place comes first now, but what is kept in the second is still read.
    assert store.load("scan", "cpu") == b"code"


def test_nowhere_to_keep_it_is_no_error(folders):
    for folder in folders:
        folder.write_text("")
    store.save("scan", "cpu", b"code")
    assert store.load("scan", "cpu") is None
    assert store.place() is None


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_write_to_is_not_read(folders, mode):
    store.save("scan", "cpu", b"code")
    place = store.place()
    place.chmod(mode)
    assert store.load("scan", "cpu") is None
    assert not store.is_kept("scan")
    assert store.place().parent == folders[1]


def test_a_link_to_a_folder_is_not_read(folders, tmp_path):
    store.save("scan", "cpu", b"code")
    place = store.place()
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    assert store.load("scan", "cpu") is None


def test_damage_is_noticed(folders):
    store.save("scan", "cpu", b"code")
    [path] = store.place().iterdir()
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content[:-1] + b"x"):
        path.write_bytes(damaged)
        assert store.load("scan", "cpu") is None


def test_all_sources_of_the_room_are_part_of_the_version(monkeypatch):
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


def test_folders_of_versions_long_gone_are_removed(folders):
    for age in range(8):
        old = folders[0] / f"machine-code-{age}"
        old.mkdir(parents=True)
        os.utime(old, (time.time() - 100 * (age + 1),) * 2)
    (folders[0] / "something else").mkdir()
    store.save("scan", "cpu", b"code")
    kept = {folder.name for folder in folders[0].iterdir()}
    assert kept == {store.place().name, "something else", *(f"machine-code-{age}" for age in range(4))}
