import os
from pathlib import Path

import pytest

from tilewright.errors import UserError
from tilewright.files import atomic_file, atomic_folder, make_folder, remove_folder, require_absent, require_file, write_text


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "checkpoints" / "one"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "one") as temporary:
        (temporary / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(tmp_path):
        pass


@pytest.fixture
def synced(monkeypatch):
    """Return the list of synced paths and of "renamed NEW", in order."""
    done = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(Path(os.readlink(f"/proc/self/fd/{file}"))), fsync(file)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append(f"renamed {new}"), rename(old, new)))
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the names of open files are read from /proc")
def test_a_folder_is_synced_before_it_appears_and_its_name_after(tmp_path, synced):
    path = tmp_path / "new" / "one"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("1")
        make_folder(temporary / "deep" / "er")
        (temporary / "deep" / "er" / "b").write_text("2")
        del synced[:]
    appeared = synced.index(f"renamed {path}")
    for inside in ("a", "deep/er/b", "deep/er", "deep", ""):
        assert synced.index(temporary / inside) < appeared
    assert path.parent in synced[appeared:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the names of open files are read from /proc")
def test_new_parent_folders_are_synced(tmp_path, synced):
    write_text(tmp_path / "a" / "b" / "c", "1")
    assert [tmp_path, tmp_path / "a"] == synced[:2]
    assert synced[-1] == tmp_path / "a" / "b"


def test_an_interrupted_removal_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "one")
    (left,) = tmp_path.iterdir()
    assert left.name == f".one.{os.getpid()}.tmp"
    (tmp_path / "two").mkdir()
    remove_folder(tmp_path / "two")
    assert list(tmp_path.iterdir()) == [left]


def test_missing_empty_and_existing_files(tmp_path):
    with pytest.raises(UserError, match=r"corpus .*a.txt does not exist: make one"):
        require_file(tmp_path / "a.txt", "corpus", "make one")
    with pytest.raises(UserError, match="is not a file"):
        require_file(tmp_path, "corpus")
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"a.txt is empty"):
        require_file(tmp_path / "a.txt", "corpus")
    with pytest.raises(UserError, match=r"a.txt exists already: remove it or name another with --out"):
        require_absent(tmp_path / "a.txt")
    assert require_absent(tmp_path / "b.txt") == tmp_path / "b.txt"
