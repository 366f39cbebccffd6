"""Round trips of checkpoints, and detection of damaged files."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tilewright.errors import UserError
from tilewright.model import ModelConfig, TransformerLM
from tilewright.train.checkpoint.layout import list_checkpoints, newest_valid, verify_checkpoint
from tilewright.train.checkpoint.reader import load_weights, read_state, read_tensors
from tilewright.train.checkpoint.writer import CheckpointWriter

SHAPE = ModelConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=8)
FILES = ["manifest.json", "model.safetensors", "rng.safetensors", "state.json"]


def tensors(seed=0):
    torch.manual_seed(seed)
    return {"model": {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(3)}, "rng": {"cpu": torch.get_rng_state()}}


def save(run, step=1, values=None, **options):
    with CheckpointWriter(run, keep=3) as writer:
        writer.save(step, tensors(step) if values is None else values, {}, **options)
    return run / "checkpoints" / f"step-{step:08d}"


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a
    )


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
DTYPES += [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_every_dtype_and_memory_layout(tmp_path, dtype):
    numbers = torch.randint(0, 256, (4, 6, dtype.itemsize), dtype=torch.uint8, generator=torch.manual_seed(0))
    whole = (numbers % 2 if dtype == torch.bool else numbers).view(dtype).view(4, 6)
    values = {
        "whole": whole,
        "layers.0.transposed": whole.T,
        "strided": whole[::2, 1::3],
        "expanded": whole[:1].expand(3, 6),
        "scalar": whole[1, 2],
        "empty": whole[:0],
    }
    folder = save(tmp_path, values={"model": values})
    verify_checkpoint(folder)
    for read in (read_tensors(folder, "model"), load_file(folder / "model.safetensors")):
        assert read.keys() == values.keys()
        for name, value in values.items():
            assert read[name].dtype == dtype
            assert read[name].shape == value.shape
            # As bytes, because NaN does not equal NaN.
            assert read[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


def test_round_trip_of_the_state(tmp_path):
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(7, tensors(), {"lr": 0.1 + 0.2, "rows": [1, None, "x"]}, valid_loss=1 / 3)
    state = read_state(newest_valid(tmp_path)[0])
    assert state == {"lr": 0.1 + 0.2, "rows": [1, None, "x"], "step": 7, "valid_loss": 1 / 3}


def test_a_checkpoint_is_plain_safetensors_and_json(tmp_path):
    folder = save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "tilewright-checkpoint-2"
    assert sorted(manifest["files"]) == FILES[1:]


def test_checkpoints_are_listed_by_step(tmp_path):
    steps = [100_000_000, 5, 99_999_999, 0]
    for step in steps:
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    for other in ("set-aside-step-00000005", ".step-00000005.123.tmp", "step-five"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert [int(folder.name[5:]) for folder in list_checkpoints(tmp_path)] == sorted(steps)
    assert list_checkpoints(tmp_path / "none") == []


def damage(path, how):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "grown":
        path.write_bytes(content + b"\0")
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["removed", "cut", "emptied", "grown"])
def test_damaged_checkpoint_is_skipped_with_a_reason(tmp_path, name, how):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad / name, how)
    with pytest.raises(UserError) as caught:
        verify_checkpoint(bad)
    message = str(caught.value)
    assert str(bad) in message
    assert "\n" not in message
    if name != "manifest.json":
        assert f"{name} {'is missing' if how == 'removed' else 'has'}" in message
    assert newest_valid(tmp_path) == (good, [(bad, message)])


def test_errors_of_invalid_manifests(tmp_path):
    folder = save(tmp_path)
    manifest = (folder / "manifest.json").read_text()

    def problem():
        with pytest.raises(UserError) as caught:
            verify_checkpoint(folder)
        return str(caught.value)

    for content, expected in (
        (
            manifest.replace("checkpoint-2", "checkpoint-9"),
            "format 'tilewright-checkpoint-9': expected one of",
        ),
        ("[]", "manifest.json is not the manifest"),
        ('{"format": "tilewright-checkpoint-2"}', "does not list state.json"),
        (manifest.replace('"rng.', '"../rng.'), "its entry '../rng.safetensors' is not the record of a file"),
        (manifest.replace("sha256", "md5"), "is not the record of a file"),
    ):
        (folder / "manifest.json").write_text(content)
        assert expected in problem()
    (folder / "manifest.json").unlink()
    assert "is not a complete checkpoint: it has no manifest.json" in problem()
    with pytest.raises(UserError, match="is not a checkpoint: there is no such folder"):
        verify_checkpoint(tmp_path / "nothing")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_detected(tmp_path, data):
    folder = tmp_path / "checkpoints" / "step-00000001"
    if not folder.exists():
        save(tmp_path)
    path = folder / data.draw(st.sampled_from(FILES))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(changed)
        with pytest.raises(UserError, match="step-00000001"):
            verify_checkpoint(folder)
    finally:
        path.write_bytes(content)


def test_verification_of_one_group_ignores_damage_in_others(tmp_path):
    folder = save(tmp_path)
    content = bytearray((folder / "rng.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "rng.safetensors").write_bytes(content)
    assert newest_valid(tmp_path)[0] is None
    assert newest_valid(tmp_path, ["model"]) == (folder, [])
    damage(folder / "rng.safetensors", "cut")
    assert newest_valid(tmp_path, ["model"])[0] is None


def test_read_state_rejects_truncated_tensors(tmp_path):
    folder = save(tmp_path)
    damage(folder / "model.safetensors", "cut")
    with pytest.raises(UserError, match=r"model.safetensors has \d+ bytes: expected \d+"):
        read_state(folder)


@pytest.mark.parametrize("how", ["cut", "emptied"])
def test_read_tensors_rejects_damaged_files(tmp_path, how):
    folder = save(tmp_path)
    damage(folder / "model.safetensors", how)
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors: "):
        read_tensors(folder, "model")
    with pytest.raises(UserError, match="has no tensors of the group ema"):
        read_tensors(folder, "ema")


def test_tensors_do_not_depend_on_their_file(tmp_path):
    folder = save(tmp_path)
    read = read_tensors(folder, "model")
    (folder / "model.safetensors").write_bytes(b"")
    assert same(read, tensors(1)["model"])


def test_load_weights(tmp_path):
    torch.manual_seed(0)
    model, other = TransformerLM(SHAPE), TransformerLM(SHAPE)
    folder = save(tmp_path, values={"ema": model.state_dict()})
    load_weights(folder, other, "ema")
    assert same(model.state_dict(), other.state_dict())


def test_load_weights_rejects_other_shapes(tmp_path):
    folder = save(tmp_path, values={"model": TransformerLM(SHAPE).state_dict()})

    def error_of(**changes):
        other = TransformerLM(ModelConfig(**{**SHAPE.__dict__, **changes}))
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(UserError) as caught:
            load_weights(folder, other)
        assert same(before, other.state_dict())
        return str(caught.value)

    assert "has shape (" in error_of(d_ff=16)
    assert "the checkpoint has no layers.1" in error_of(num_layers=2)
    assert "the model has no lm_head.weight" in error_of(tie_embeddings=True)
