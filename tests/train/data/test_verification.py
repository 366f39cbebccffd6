import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.train.data.token_file import TokenDataset, write_tokens
from tilewright.train.data.verification import Verification


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        write_tokens(tmp_path / f"{name}.tokens", [np.arange(3000) % 300], 300)
    return [TokenDataset(tmp_path / f"{name}.tokens") for name in ("a", "b")]


def flip_ids(path):
    content = np.fromfile(path, np.uint8)
    content[4096::2] ^= 1
    content.tofile(path)


def test_valid_files_pass(files):
    verification = Verification(files)
    verification.finish()
    verification.check()
    verification.close()


@pytest.mark.parametrize("damaged", [0, 1])
def test_error_names_a_changed_file(files, damaged):
    flip_ids(files[damaged].path)
    verification = Verification(files)
    with pytest.raises(UserError, match=rf"{files[damaged].path} has changed: the hash of its ids differs"):
        verification.finish()
    with pytest.raises(UserError, match="has changed"):
        verification.check()
    verification.close()


def test_error_names_a_missing_file(files):
    files[1].path.unlink()
    with pytest.raises(UserError, match=r"cannot read token file .*b.tokens: No such file"):
        Verification(files).finish()


def test_close_stops_after_the_current_piece(files, monkeypatch):
    pieces = []
    monkeypatch.setattr("tilewright.train.data.token_file._HASH_BYTES", 100)
    verification = Verification(files)
    after_piece = verification._after_piece
    monkeypatch.setattr(verification, "_after_piece", lambda size: pieces.append(size) or after_piece(size))
    verification.close()
    verification.check()
    assert sum(pieces) < 2 * 6000
