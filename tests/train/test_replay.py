"""A run depends only on its options and data, not on interruptions or the micro-batch size."""

import shutil

import pytest
import torch

from faults import outcome, rows
from tilewright.tokenizer import Tokenizer
from tilewright.train import train
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.reader import read_tensors
from tilewright.train.data.datasets import open_data
from tilewright.train.data.sampling import TrainingData


def test_40_steps_across_an_epoch_boundary_are_replayed_exactly(changed, tmp_path):
    options = {"steps": 40, "batch_size": 8, "eval_every": 10, "checkpoint_every": 5, "keep_checkpoints": 8}
    whole, again = changed(out=tmp_path / "whole", **options), changed(out=tmp_path / "again", **options)
    (train_data, *_), _ = open_data(whole.data, Tokenizer.load(whole.data.tokenizer))
    data = TrainingData((train_data,), whole.model.context_length, whole.seed)
    # The epoch boundary is inside the run, before some interruptions and after others.
    assert 15 * 8 < data.num_windows[0] < 30 * 8, data.num_windows
    train(whole)
    expected = outcome(whole.out)
    assert len(expected[0]) == 40
    train(again)
    assert outcome(again.out) == expected
    for part in (10, 15, 20, 25, 30):
        broken = changed(out=tmp_path / f"broken-{part}", **options)
        shutil.copytree(whole.out, broken.out)
        for folder in list_checkpoints(broken.out):
            if int(folder.name.removeprefix("step-")) > part:
                shutil.rmtree(folder)
        train(broken, resume="auto")
        assert outcome(broken.out) == expected, part


def test_gradient_accumulation_matches_one_batch(changed, tmp_path):
    runs = [changed(out=tmp_path / str(micro), batch_size=8, micro_batch_size=micro, precision="float32") for micro in (8, 1)]
    for config in runs:
        train(config)
    together, apart = (rows(config.out) for config in runs)
    for name in ("loss", "grad_norm", "valid_loss"):
        found = [[row[name] for row in rows if name in row] for rows in (together, apart)]
        assert found[0] == pytest.approx(found[1], rel=1e-6)
    together, apart = (read_tensors(list_checkpoints(config.out)[-1], "model") for config in runs)
    for name, weight in together.items():
        torch.testing.assert_close(weight, apart[name], rtol=0, atol=1e-6)
