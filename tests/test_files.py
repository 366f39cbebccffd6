import pytest

from tilewright.errors import UserError
from tilewright.files import atomic_file, atomic_folder, require_absent, require_file, write_text


def test_a_file_appears_when_it_is_whole(tmp_path):
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


def test_a_folder_appears_when_it_is_whole(tmp_path):
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
