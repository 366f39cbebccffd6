"""The command that compiles ahead of time: its output, and that later starts compile nothing."""

import logging

import pytest

from tilewright.cli import main
from tilewright.tokenizer.compiled import jit, store


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Two functions that compile fast, with a folder for their machine code."""
    some = [jit.Compiled(each.__wrapped__, each._arguments) for each in jit.ALL if each.name.startswith("decoder.")]
    monkeypatch.setattr(jit, "ALL", some)
    monkeypatch.setattr(store, "machine_code_folders", lambda: [tmp_path])
    return some


def test_all_functions_are_compiled_once(few, capsys, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    assert main(["tokenizer", "warm"]) == 0
    folder = store.writable_folder()
    out = capsys.readouterr().out
    assert out.startswith("compiled 2 functions in ")
    assert out.endswith(f" s, stored in {folder}\n")
    assert [record.message.split(" in ")[0] for record in caplog.records] == [
        "compiling the tokenizer for this machine (once)",
        "compiled",
    ]
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {each.name for each in few}
    for each in few:
        each.entry = None
    assert main(["tokenizer", "warm"]) == 0
    assert capsys.readouterr().out.startswith(f"all 2 functions are in {folder}; loaded in ")
    assert len(caplog.records) == 2
    # A newly configured folder receives the code of all other folders.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "machine_code_folders", lambda: [tmp_path / "named", tmp_path])
        for each in few:
            each.entry = None
        assert main(["tokenizer", "warm"]) == 0
        assert capsys.readouterr().out.endswith("; 2 copied from other folders\n")
        assert {path.read_bytes() for path in store.writable_folder().iterdir()} == {
            path.read_bytes() for path in folder.iterdir()
        }


def test_a_missing_cache_folder_raises(few, capsys, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "machine_code_folders", lambda: [folder])
        assert main(["tokenizer", "warm"]) == 2
    assert "no cache folder is writable; set NUMBA_CACHE_DIR" in capsys.readouterr().err
    assert all(each.entry is None for each in few)
