"""Reading of checkpoints of every format, and errors for damaged files."""

import json

import pytest
import torch

from tilewright.errors import UserError
from tilewright.train import load_config, load_run, train
from tilewright.train.checkpoint.formats import FORMATS
from tilewright.train.checkpoint.layout import list_checkpoints, newest_valid, verify_checkpoint
from tilewright.train.checkpoint.reader import read_state, read_tensors, tensor_names
from tilewright.train.checkpoint.tensor_files import TensorReader, write_tensors


def as_format_1(folder):
    """Convert a current checkpoint to the format of the first version of this project."""
    for name in ("manifest.json", "guard.safetensors", "rng.safetensors"):
        (folder / name).unlink()
    state = {"format": "tilewright-checkpoint-1", "step": json.loads((folder / "state.json").read_text())["step"]}
    (folder / "state.json").write_text(json.dumps(state) + "\n")


# Functions that convert a current checkpoint, by format.
CONVERTERS = {"tilewright-checkpoint-1": as_format_1, "tilewright-checkpoint-2": lambda folder: None}


@pytest.fixture(params=sorted(FORMATS))
def made(request, changed):
    """A run whose newest checkpoint has the format, and its weights."""
    config = changed(steps=8)
    train(config)
    folder = list_checkpoints(config.out)[-1]
    weights = read_tensors(folder, "model")
    CONVERTERS[request.param](folder)
    return config, folder, weights


def test_every_format_is_tested():
    assert CONVERTERS.keys() == FORMATS.keys()


def test_a_checkpoint_of_every_format_is_read(made):
    config, folder, weights = made
    verify_checkpoint(folder)
    assert newest_valid(config.out) == (folder, [])
    state = read_state(folder)
    assert (state["step"], state["unfinished_row"]) == (8, None)
    assert {"model", "optimizer"} <= set(tensor_names(folder))
    model, _ = load_run(config.out)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    # The run initializes what the format lacks.
    train(load_config(config.out / "config.json"), resume="auto")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_error_names_a_truncated_file_in_every_format(made, file):
    config, folder, _ = made
    path = folder / file
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=file if file != "state.json" else r"state.json|no manifest.json"):
        verify_checkpoint(folder)
    assert newest_valid(config.out)[0] != folder


def test_error_names_the_format_of_a_later_version(made):
    _, folder, _ = made
    (folder / "manifest.json").write_text(json.dumps({"format": "tilewright-checkpoint-9"}))
    with pytest.raises(UserError, match="'tilewright-checkpoint-9': expected one of tilewright-checkpoint-2, "):
        verify_checkpoint(folder)


def test_numbered_tensors_are_joined(tmp_path):
    # Earlier versions saved Muon's momenta so, here of a joined weight and of experts with two matrices each.
    whole = {"joined": torch.randn(6, 4), "experts": torch.randn(3, 5, 4), "plain": torch.randn(2)}
    parts = {f"joined.{i}": part for i, part in enumerate(whole["joined"].split([4, 2]))}
    matrices = [part for matrix in whole["experts"] for part in matrix.split([2, 3])]
    parts |= {f"experts.{i}": part for i, part in enumerate(matrices)} | {"plain": whole["plain"]}
    write_tensors(tmp_path / "optimizer.safetensors", {name: part.contiguous() for name, part in parts.items()})
    reader = TensorReader(tmp_path, "optimizer")
    reader.join_numbered({name: tensor.shape for name, tensor in whole.items()})
    assert reader.shapes == {name: tensor.shape for name, tensor in whole.items()}
    torch.testing.assert_close(reader.read(), whole, rtol=0, atol=0)
    second = torch.empty(1, 5, 4)
    reader.read_into("experts", second, [1, 0, 0])
    assert torch.equal(second[0], whole["experts"][1])
