"""Runs with each optimizer: they learn, resume bit for bit, and can be loaded."""

import dataclasses

import pytest
import torch

from faults import outcome
from tilewright.errors import UserError
from tilewright.train import load_run, train
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.reader import read_tensors
from tilewright.train.metrics import read_metrics

RULES = {
    "muon": {"name": "muon"},
    "schedule_free": {"name": "schedule_free", "schedule": "constant"},
    "8bit": {"states": "8bit"},
    "bfloat16": {},
}


@pytest.mark.parametrize("rule", RULES)
def test_resume_is_bitwise_and_load_run_returns_the_weights(changed, config, tmp_path, rule):
    if rule == "8bit":
        pytest.importorskip("torchao")
    options = {"optimizer": dataclasses.replace(config.optimizer, **RULES[rule])}
    if rule == "bfloat16":
        options |= {"weights": "bfloat16", "ema_decay": 0.9}
    whole, resumed = (changed(out=tmp_path / name, keep_checkpoints=3, **options) for name in ("whole", "resumed"))
    valid_loss = train(whole).valid_loss
    train(resumed)
    train(resumed, resume=resumed.out / "checkpoints" / "step-00000004")
    assert outcome(resumed.out) == outcome(whole.out)
    losses = [row["loss"] for row in read_metrics(whole.out)]
    assert losses[-1] < losses[0] - 0.3
    last = list_checkpoints(whole.out)[-1]
    weights = read_tensors(last, "model")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16 if rule == "bfloat16" else torch.float32}
    means = read_tensors(last, "ema") if rule in ("schedule_free", "bfloat16") else weights
    model, _ = load_run(whole.out, "cpu")
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, means[name]), name
        if rule in ("schedule_free", "bfloat16"):
            assert not torch.equal(means[name], weights[name].float()), name
    assert valid_loss < losses[0]


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ({"name": "muon"}, {"weights": "bfloat16"}, "weights is bfloat16: expected float32 unless optimizer.name is adamw"),
        (RULES["8bit"], {"weights": "bfloat16"}, "weights is bfloat16"),
        (RULES["8bit"] | {"name": "muon"}, {}, "optimizer.states is 8bit: expected float32 unless optimizer.name is adamw"),
        ({"name": "schedule_free"}, {}, "optimizer.schedule is cosine: expected constant if optimizer.name is"),
        (RULES["schedule_free"] | {"betas": (0.0, 0.9)}, {}, r"optimizer.betas is \(0.0, 0.9\): expected a first beta above 0"),
        (
            RULES["schedule_free"],
            {"ema_decay": 0.9},
            "ema_decay is 0.9: expected None if optimizer.name is schedule_free",
        ),
    ],
)
def test_incompatible_options_are_rejected(changed, config, rule, options, message):
    with pytest.raises(UserError, match=message):
        changed(optimizer=dataclasses.replace(config.optimizer, **rule), **options)
