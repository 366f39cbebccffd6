"""Non-finite losses and spikes: steps are skipped and counted, and too many consecutive ones stop the run with a diagnosis."""

import dataclasses
import json
import math

import pytest
import torch

from faults import outcome, rows
from tilewright.errors import DivergedError
from tilewright.train import train
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.reader import read_tensors
from tilewright.train.data.sampling import TrainingData
from tilewright.train.trainer import Trainer, TrainingLoss


def spoil(monkeypatch, steps, change):
    """Apply `change` to the losses of some steps, counted from 1; return the weights after each step."""
    weights, forward, train_step = {}, TrainingLoss.forward, Trainer.train_step
    now = [0]

    def spoilt(self, inputs, targets):
        loss = forward(self, inputs, targets)
        return change(loss) if now[0] in steps and torch.is_grad_enabled() else loss

    def watched(self):
        now[0] = self.step + 1
        metrics = train_step(self)
        weights[self.step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return metrics

    monkeypatch.setattr(TrainingLoss, "forward", spoilt)
    monkeypatch.setattr(Trainer, "train_step", watched)
    return weights


def same(left, right):
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


SPOILT = {"nan": lambda loss: loss * math.nan, "inf": lambda loss: loss * math.inf}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_with_a_non_finite_loss_are_skipped_and_counted(changed, config, monkeypatch, kind, optimizer):
    config = changed(optimizer=dataclasses.replace(config.optimizer, name=optimizer), max_skipped_steps=3)
    weights = spoil(monkeypatch, {5, 6, 10}, SPOILT[kind])
    result = train(config)
    assert result.skipped_steps == 3
    assert [row["skipped_steps"] for row in rows(config.out)] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3]
    assert [row["step"] for row in rows(config.out) if row["loss"] is None] == [5, 6, 10]
    assert [step for step in range(2, 13) if same(weights[step - 1], weights[step])] == [5, 6, 10]
    assert rows(config.out)[-1]["loss"] < rows(config.out)[0]["loss"]


def test_step_with_a_non_finite_gradient_is_skipped(config, monkeypatch):
    # The derivative of sqrt at 0 is infinite.
    weights = spoil(monkeypatch, {5}, lambda loss: loss + (loss - loss).sqrt())
    assert train(config).skipped_steps == 1
    assert same(weights[4], weights[5])
    row = rows(config.out)[4]
    assert row["loss"] is not None
    assert row["grad_norm"] is None


def test_step_with_a_spike_is_skipped(changed, monkeypatch):
    config = changed(steps=50, log_every=10, eval_every=50)
    weights = spoil(monkeypatch, {45}, lambda loss: 10 * loss)
    assert train(config).skipped_steps == 1
    assert [step for step in range(2, 51) if same(weights[step - 1], weights[step])] == [45]


def test_non_finite_micro_batch_skips_the_whole_step(changed, monkeypatch):
    config, calls = changed(micro_batch_size=1), []

    def third(loss):
        calls.append(loss)
        return loss * math.nan if len(calls) == 3 else loss

    weights = spoil(monkeypatch, {5}, third)
    assert train(config).skipped_steps == 1
    assert same(weights[4], weights[5])


def test_run_with_skipped_steps_resumes_bit_identically(changed, monkeypatch, tmp_path):
    whole, broken = changed(out=tmp_path / "whole"), changed(out=tmp_path / "broken", keep_checkpoints=3)
    spoil(monkeypatch, {4, 5, 7}, SPOILT["nan"])
    train(whole)
    train(broken)
    train(broken, resume=broken.out / "checkpoints" / "step-00000004")
    assert outcome(broken.out) == outcome(whole.out)


def test_lower_limit_does_not_apply_to_earlier_steps(changed, monkeypatch):
    config = changed(keep_checkpoints=3)
    spoil(monkeypatch, {5, 6, 7}, SPOILT["nan"])
    train(config)
    stricter = dataclasses.replace(config, max_skipped_steps=2)
    assert train(stricter, resume=config.out / "checkpoints" / "step-00000008").skipped_steps == 3
    with pytest.raises(DivergedError, match="2 consecutive steps"):
        train(stricter, resume=config.out / "checkpoints" / "step-00000004")


def test_too_many_consecutive_skips_stop_the_run(changed, config, monkeypatch):
    bad = changed(max_skipped_steps=3, steps=40, eval_every=40)
    spoil(monkeypatch, {5, 6, 9, *range(17, 41)}, SPOILT["nan"])
    with pytest.raises(DivergedError, match=r"3 consecutive steps had a non-finite loss or a loss spike.*below 0.01") as error:
        train(bad)
    diagnosis = json.loads((bad.out / "diagnosis.json").read_text())
    assert str(bad.out / "diagnosis.json") in str(error.value)
    assert diagnosis["step"] == 18
    assert diagnosis["guard"] == {"taken": 13, "skipped": 6, "in_a_row": 3, "most_in_a_row": 3}
    assert list_checkpoints(bad.out)[-1].name == "step-00000016"
    last = list_checkpoints(bad.out)[-1]
    assert all(tensor.isfinite().all() for tensor in read_tensors(last, "model").values())
    monkeypatch.undo()
    train(bad, resume="auto")
    assert rows(bad.out)[-1]["step"] == 40
    assert rows(bad.out)[-1]["skipped_steps"] == 3


def test_diagnosis_file_names_the_layer_and_the_batch(changed, monkeypatch):
    config = changed(max_skipped_steps=2, steps=10)
    train_step = Trainer.train_step

    def planting(self):
        if self.step == 6:
            with torch.no_grad():
                self.model.layers[1].ffn.down_proj.weight[3, 5] = math.nan
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", planting)
    seen = {}
    monkeypatch.setattr(TrainingData, "place", remember(TrainingData.place, seen))
    with pytest.raises(DivergedError, match=r"the weights of layers.1.ffn.down_proj.weight and the outputs of layers.1.ffn"):
        train(config)
    diagnosis = json.loads((config.out / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert diagnosis.keys() == {
        "step", "loss", "guard", "first_not_finite", "batch", "output_norms", "weight_norms", "gradient_norms",
    }  # fmt: skip
    assert diagnosis["first_not_finite"]["weights"] == "layers.1.ffn.down_proj.weight"
    assert diagnosis["first_not_finite"]["outputs"].startswith("layers.1.ffn")
    assert diagnosis["step"] == 7
    assert diagnosis["loss"] == "nan"
    assert [(place["file"], place["first_token"]) for place in diagnosis["batch"]] == [
        (str(path), start) for path, start in (seen[sample] for sample in range(28, 32))
    ]
    assert set(diagnosis["weight_norms"]) == set(diagnosis["gradient_norms"])
    assert [name for name, norm in diagnosis["weight_norms"].items() if norm == "nan"] == ["layers.1.ffn.down_proj.weight"]
    assert all(norm > 0 for name, norm in diagnosis["output_norms"].items() if name.startswith("layers.0."))
    assert diagnosis["output_norms"]["layers.1.ffn.down_proj"] == "nan"


def remember(function, seen):
    def wrapped(self, sample):
        seen[sample] = function(self, sample)
        return seen[sample]

    return wrapped
