"""Cache folders: their order, their permissions, and the fallback for a user without a home folder."""

import os
import stat
from pathlib import Path

import pytest

from tilewright import caches
from tilewright.caches import is_private, machine_code_folders, make_private


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"tilewright-{os.getuid()}"


def mode(folder):
    return stat.S_IMODE(folder.stat().st_mode)


def test_numba_cache_dir_is_first_and_the_temporary_folder_last(monkeypatch, temporary):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/named")
    monkeypatch.setenv("XDG_CACHE_HOME", "/user")
    monkeypatch.setattr(caches.sys, "platform", "linux")
    package = Path(caches.__file__).parent
    own = package / "tokenizer" / "compiled" / "__pycache__"
    assert machine_code_folders() == [Path("/named"), own, Path("/user/tilewright"), temporary]
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert machine_code_folders() == [own, Path("/home/someone/.cache/tilewright"), temporary]
    monkeypatch.setattr(caches.sys, "platform", "darwin")
    assert machine_code_folders()[1] == Path("/home/someone/Library/Caches/tilewright")


def test_a_user_without_a_home_uses_the_temporary_folder(monkeypatch, temporary):
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(caches.Path, "home", no_home)
    assert machine_code_folders()[1:] == [temporary]
    code = temporary / "machine-code"
    assert make_private(code)
    assert (mode(temporary), mode(code)) == (0o700, 0o700)
    assert make_private(code)


def test_other_folders_are_readable_by_all(temporary, tmp_path):
    mask = os.umask(0o002)
    try:
        assert make_private(tmp_path / "cache" / "machine-code")
    finally:
        os.umask(mask)
    assert mode(tmp_path / "cache" / "machine-code") == 0o755


@pytest.mark.parametrize("wrong", ["link", "file", "writable", "foreign"])
def test_a_temporary_folder_of_another_user_is_not_used(monkeypatch, temporary, tmp_path, wrong):
    if wrong == "link":
        (tmp_path / "elsewhere").mkdir()
        temporary.symlink_to(tmp_path / "elsewhere")
    elif wrong == "file":
        temporary.write_text("")
    else:
        temporary.mkdir()
        temporary.chmod(0o777 if wrong == "writable" else 0o755)
    if wrong == "foreign":
        uid = os.getuid()
        monkeypatch.setattr(caches, "_PACKAGE", tmp_path)
        monkeypatch.setattr(caches, "_owners", lambda: {uid + 1})
    assert not is_private(temporary)
    assert not make_private(temporary / "machine-code")
    assert not (temporary / "machine-code").exists()
