"""Runs of four processes with tensor and context parallelism, compared to one process. torchrun runs this file as a program."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilewright.errors import UserError
from tilewright.model import ModelConfig
from tilewright.train import OptimizerConfig, TrainConfig, train
from tilewright.train.checkpoint.joined import joined_parts, order_rows_by_process, rows_by_process
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.reader import read_tensors, tensor_names
from tilewright.train.config import load_config, save_config
from tilewright.train.distributed import Layout, World, check_parallel
from tilewright.train.metrics import read_metrics
from tilewright.train.presets import corpus_files

# For slow or busy machines.
pytestmark = pytest.mark.timeout(600)

LAYOUTS = ("ddp,tp=2", "ddp,cp=2", "fsdp,tp=2,cp=2")
STEPS, HALF = 4, 2


def go_back(source, run):
    """Copy a run without its last checkpoint, as if it had stopped after half its steps."""
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")


def without_masks(config):
    """Return a run without documents and windows, for which context parallelism uses ring attention."""
    model = dataclasses.replace(config.model, window=None, window_pattern="L", local_rope_theta=None, attention_softcap=20.0)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, documents=False))


def train_all(folder):
    """Train the runs that the fixture `runs` provides."""
    base = load_config(folder / "base.json")
    for layout in LAYOUTS:
        train(dataclasses.replace(base, out=folder / layout, parallel=layout))
    train(dataclasses.replace(without_masks(base), out=folder / "ring", parallel="fsdp,cp=4"))
    for name, source, layout in (("one-then-four", "one", "fsdp,tp=2"), ("ddp-then-fsdp", "ddp,tp=2", "fsdp,cp=4")):
        if os.environ["RANK"] == "0":
            go_back(folder / source, folder / name)
        train(dataclasses.replace(base, out=folder / name, parallel=layout), resume="auto")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(Path(sys.argv[1]))


def tensors(run):
    checkpoint = list_checkpoints(run)[-1]
    return {name: read_tensors(checkpoint, name) for name in tensor_names(checkpoint)}


def assert_same(run, expected):
    ours, theirs = (
        [{k: row[k] for k in ("step", "loss", "grad_norm", "lr", "loss/old", "loss/new")} for row in read_metrics(r)]
        for r in (run, expected)
    )
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    validated = [[row["valid_loss"] for row in read_metrics(r) if "valid_loss" in row] for r in (run, expected)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    torch.testing.assert_close(tensors(run), tensors(expected), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A folder with the run `one` of a single process, and all runs of `train_all`."""
    folder = tmp_path_factory.mktemp("runs")
    shape = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "qk_norm": True, "qkv_bias": True}
    windows = {"window": 10, "window_pattern": "LG", "local_rope_theta": 100.0}
    files = (corpus / "train.txt", corpus / "valid.txt")
    config = TrainConfig(
        out=folder / "one",
        model=ModelConfig(vocab_size=300, context_length=32, **shape, **windows),
        data=dataclasses.replace(corpus_files(corpus), train=files, names=("old", "new"), documents=True),
        steps=STEPS,
        batch_size=4,
        micro_batch_size=1,
        activation_checkpointing=1,
        optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_steps=2),
        ema_decay=0.9,
        log_every=1,
        eval_every=HALF,
        eval_sequences=5,
        checkpoint_every=HALF,
        keep_checkpoints=10,
        device="cpu",
    )
    save_config(config, folder / "base.json")
    train(config)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command = [sys.executable, *launcher, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_equal_one(runs, layout):
    assert_same(runs / layout, runs / "one")


@pytest.mark.slow
def test_ring_attention_equals_one_process(runs, tmp_path):
    train(dataclasses.replace(without_masks(load_config(runs / "base.json")), out=tmp_path / "one"))
    assert_same(runs / "ring", tmp_path / "one")


@pytest.mark.slow
def test_resume_in_another_layout(runs, tmp_path):
    assert_same(runs / "one-then-four", runs / "one")
    assert_same(runs / "ddp-then-fsdp", runs / "one")
    go_back(runs / "fsdp,tp=2,cp=2", tmp_path / "again")
    train(dataclasses.replace(load_config(runs / "base.json"), out=tmp_path / "again"), resume="auto")
    assert_same(tmp_path / "again", runs / "one")


@pytest.mark.slow
def test_initial_weights_do_not_depend_on_the_layout(runs):
    ours, theirs = (read_tensors(list_checkpoints(runs / name)[0], "model") for name in ("fsdp,tp=2,cp=2", "one"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_processes_share_every_part_of_a_joined_weight():
    parts, tp = (8, 4, 4), 2
    weight = torch.arange(16).view(16, 1)
    rows = [list(r) for r in rows_by_process(parts, tp)]
    assert rows == [[0, 1, 2, 3], [8, 9], [12, 13], [4, 5, 6, 7], [10, 11], [14, 15]]
    layer = torch.nn.Module()
    from tilewright.model.layers import JoinedLinear

    layer.qkv_proj = JoinedLinear(1, parts)
    assert joined_parts(layer) == {"qkv_proj.weight": parts}
    ordered = order_rows_by_process({"qkv_proj.weight": weight, "other": weight}, layer, tp)
    assert ordered["qkv_proj.weight"].flatten().tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert ordered["other"] is weight


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"parallel": "ddp,tp=2"}, 1, "must be a multiple of 2, not 1"),
        ({"parallel": "fsdp,tp=2,cp=2"}, 6, "must be a multiple of 4, not 6"),
        ({"parallel": "fsdp,tp=2", "batch_size": 3}, 4, "number of groups of 2 processes, 2"),
        ({"parallel": "ddp,tp=3"}, 3, "model.num_heads is 2: with tp=3"),
        ({"parallel": "ddp,cp=3"}, 3, "model.context_length is 16: with tp=1,cp=3 it must be a multiple of 6"),
        ({"parallel": "ddp,tp=2", "optimizer": OptimizerConfig(name="muon", warmup_steps=3)}, 2, "with tp=2 choose adamw"),
        ({"parallel": "ddp,cp=2", "sample_every": 4}, 2, "it must be None"),
        ({"parallel": "ddp,tp=2", "precision": "fp8"}, 2, "with tp=2 choose bfloat16 or float32"),
    ],
)
def test_indivisible_configurations_are_rejected(changed, changes, size, message):
    config = changed(**changes)
    with pytest.raises(UserError, match=message):
        check_parallel(config, World(torch.device("cpu"), 0, size, layout=Layout.parse(config.parallel)))


def test_experts_reject_tensor_parallelism(changed, config):
    experts = changed(parallel="ddp,tp=2", model=dataclasses.replace(config.model, num_experts=4))
    with pytest.raises(UserError, match="experts need ddp or fsdp alone, not tp=2,cp=1"):
        check_parallel(experts, World(torch.device("cpu"), 0, 2, layout=Layout(tp=2)))


def test_parse_rejects_duplicate_sizes():
    assert Layout.parse("fsdp,cp=4,tp=2") == Layout(sharded=True, tp=2, cp=4)
    with pytest.raises(UserError, match="tp and cp once at most"):
        Layout.parse("ddp,tp=2,tp=2")
