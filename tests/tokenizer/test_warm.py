"""The command that compiles ahead: what it says, and that nothing is compiled after it."""

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


def test_all_is_compiled_and_then_found(few, capsys, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    assert main(["tokenizer", "warm"]) == 0
    folder = store.place()
    out = capsys.readouterr().out
    assert out.startswith("compiled 2 functions in ")
    assert out.endswith(f" s, kept in {folder}\n")
    assert [record.message.split(" in ")[0] for record in caplog.records] == [
        "compiling the tokenizer for this machine (once)",
        "compiled",
    ]
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {each.name for each in few}
    for each in few:
        each.entry = None
    assert main(["tokenizer", "warm"]) == 0
    assert capsys.readouterr().out.startswith(f"all 2 functions are in {folder}, and load in ")
    assert len(caplog.records) == 2
    # A folder that is named takes all of it, wherever it was found.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "machine_code_folders", lambda: [tmp_path / "named", tmp_path])
        for each in few:
            each.entry = None
        assert main(["tokenizer", "warm"]) == 0
        assert capsys.readouterr().out.endswith("; 2 came from other folders\n")
        assert {path.read_bytes() for path in store.place().iterdir()} == {path.read_bytes() for path in folder.iterdir()}


def test_nowhere_to_keep_it_is_an_error(few, capsys, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "machine_code_folders", lambda: [folder])
        assert main(["tokenizer", "warm"]) == 2
    assert "no folder for machine code can be written to: name one by NUMBA_CACHE_DIR" in capsys.readouterr().err
    assert all(each.entry is None for each in few)
