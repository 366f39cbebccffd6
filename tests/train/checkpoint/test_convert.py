"""Conversion of checkpoints to folders of torch.distributed.checkpoint and back."""

import json
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tilewright.errors import UserError
from tilewright.train import train
from tilewright.train.checkpoint.convert import convert_checkpoint
from tilewright.train.checkpoint.layout import list_checkpoints, verify_checkpoint
from tilewright.train.checkpoint.reader import read_state, read_tensors, tensor_names

# torch warns that there is only one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def checkpoint(changed):
    train(changed(steps=4, ema_decay=0.9))
    return list_checkpoints(changed().out)[-1]


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_round_trip_through_dcp_is_bitwise(checkpoint, tmp_path):
    convert_checkpoint(checkpoint, tmp_path / "dcp", to="dcp")
    expected = read_tensors(checkpoint, "model")
    weights = {name: torch.empty_like(weight) for name, weight in expected.items()}
    dcp.load({"model": weights}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    convert_checkpoint(tmp_path / "dcp", tmp_path / "back")
    verify_checkpoint(tmp_path / "back")
    assert read_state(tmp_path / "back") == read_state(checkpoint)
    assert tensor_names(tmp_path / "back") == tensor_names(checkpoint)
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "back", checkpoint))
    assert ours == theirs


def test_metadata_with_other_classes_is_rejected_unexecuted(checkpoint, tmp_path):
    convert_checkpoint(checkpoint, tmp_path / "dcp", to="dcp")
    metadata = tmp_path / "dcp/.metadata"
    metadata.write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(UserError, match=r"names \w+\.open, which no checkpoint of tensors contains"):
        convert_checkpoint(tmp_path / "dcp", tmp_path / "back")
    assert not (tmp_path / "harm").exists()
    metadata.write_bytes(metadata.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"cannot read .*\.metadata: "):
        convert_checkpoint(tmp_path / "dcp", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_unsupported_dcp_folders_are_rejected(checkpoint, tmp_path):
    dcp.save({"model": {"weight": torch.ones(2)}, "epoch": 3}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    with pytest.raises(UserError, match=r"has no state\.json"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    shutil.copyfile(checkpoint / "state.json", tmp_path / "theirs/state.json")
    with pytest.raises(UserError, match="epoch is pickled and not a tensor"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(UserError, match="num_shards is 2: it must be left out to and from dcp"):
        convert_checkpoint(checkpoint, tmp_path / "dcp", num_shards=2, to="dcp")
