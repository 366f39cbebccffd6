import json

import pytest
import torch
from safetensors.torch import load_file

from tilewright.errors import UserError
from tilewright.model import ModelConfig, TransformerLM
from tilewright.train import OptimizerConfig
from tilewright.train.checkpoint import list_checkpoints, load_checkpoint, load_weights, save_checkpoint
from tilewright.train.optimizer import make_optimizer

SHAPE = ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=8)


def trained(steps=2, seed=0, shape=SHAPE):
    torch.manual_seed(seed)
    model = TransformerLM(shape)
    optimizer = make_optimizer(model, OptimizerConfig())
    for _ in range(steps):
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_everything_comes_back(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, 2, model, optimizer, keep=2)
    other, other_optimizer = trained(steps=0, seed=1)
    assert load_checkpoint(folder, other, other_optimizer) == 2
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key]), (name, key)


def test_a_checkpoint_is_plain_safetensors_and_json(tmp_path):
    folder = save_checkpoint(tmp_path, 7, *trained(), keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((folder / "state.json").read_text()) == {"format": "tilewright-checkpoint-1", "step": 7}
    assert "layers.0.attn.qkv_proj.weight" in load_file(folder / "model.safetensors")


def test_only_the_newest_stay(tmp_path):
    state = trained()
    for step in (5, 10, 100, 95):
        save_checkpoint(tmp_path, step, *state, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000095", "step-00000100"]


def test_a_failed_save_leaves_the_older_ones(tmp_path, monkeypatch):
    state = trained()
    save_checkpoint(tmp_path, 1, *state, keep=1)
    monkeypatch.setattr("tilewright.train.checkpoint.json.dumps", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, *state, keep=1)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, *trained(), keep=1)
    wider = TransformerLM(ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=16))
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(UserError, match=r"ffn.w\d.weight has shape \(8, 8\) in the checkpoint, \((16, 8|8, 16)\) in the model"):
        load_weights(folder, wider)
    assert all(torch.equal(before[name], tensor) for name, tensor in wider.state_dict().items())
    deeper = TransformerLM(ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=2, num_heads=2, d_ff=8))
    with pytest.raises(UserError, match=r"the checkpoint has no layers.1"):
        load_weights(folder, deeper)
    tied = TransformerLM(
        ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=8, tie_embeddings=True)
    )
    with pytest.raises(UserError, match=r"the model has no lm_head.weight"):
        load_weights(folder, tied)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    folder = save_checkpoint(tmp_path, 1, *trained(), keep=1)
    content = (folder / name).read_bytes()
    if damage == "removed":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match="step-00000001"):
        load_checkpoint(folder, *trained(steps=0))
