import dataclasses
import json

import pytest

from tilewright.errors import UserError
from tilewright.model import ModelConfig
from tilewright.train import PRESETS, OptimizerConfig, preset
from tilewright.train.config import Change, load_config, save_config
from tilewright.train.extension import check_same_run


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_files(name, tmp_path):
    save_config(preset(name), tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == preset(name)


def test_tinystories_preset_has_the_token_budget_of_cs336():
    config = preset("tinystories-17m")
    assert config.steps * config.tokens_per_step == 327_680_000


def test_unknown_preset_lists_presets():
    with pytest.raises(UserError, match=r"'gpt3' is unknown: expected one of stories-cpu, tinystories-17m"):
        preset("gpt3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: expected at least 1"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size is 4: expected a divisor of batch_size, 6"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"steps": 3}, "warmup_steps is 3: expected less than steps, 3"),
        ({"seed": -1}, "seed is -1"),
        ({"precision": "float16"}, "precision is 'float16': .*one of auto, float32, bfloat16, fp8"),
        (
            {"cuda_graphs": True, "precision": "float32", "model": ModelConfig(300, 16, 16, 2, 2, 24, num_experts=2)},
            "precision is '?float32'?: expected a precision other than float32 if cuda_graphs is set",
        ),
        ({"steps": 3.0}, "steps is 3.0: .*an integer"),
        ({"steps": True}, "steps is True: .*an integer"),
        ({"z_loss": float("nan")}, "z_loss is nan: .*a number"),
        ({"batch_size": "all"}, "batch_size is 'all': .*an integer or auto"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1: .*true or false"),
        ({"out": "runs/mine"}, "out is 'runs/mine': .*a Path"),
        ({"batch_start": 3, "batch_warmup_steps": 4}, "batch_start is 3: expected batch_size, 4, divided by a power of 2"),
        ({"batch_start": 2}, "batch_warmup_steps is 0: expected at least 1 with batch_start"),
        ({"batch_start": 1, "batch_warmup_steps": 4, "micro_batch_size": 2}, "micro_batch_size is 2: .* of batch_start, 1"),
        ({"parallel": "tp"}, "parallel is tp: expected ddp or fsdp, optionally followed by ,tp=N"),
    ],
)
def test_invalid_run_options_raise(changed, changes, message):
    with pytest.raises(UserError, match=message):
        changed(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, r"optimizer.lr is 0.0: expected a finite number above 0"),
        ({"lr": float("nan")}, r"optimizer.lr is nan"),
        ({"final_lr": 1.0}, r"optimizer.final_lr is 1.0: expected 0 to lr"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas is \(0.9, 1.0\)"),
        ({"weight_decay": -0.1}, r"optimizer.weight_decay is -0.1"),
        ({"name": "lion"}, "optimizer.name is 'lion': .*one of adamw, muon"),
        ({"schedule": "sine"}, "optimizer.schedule is 'sine': .*one of cosine, wsd, linear"),
        ({"eps": float("inf")}, r"optimizer.eps is inf: expected a finite number above 0"),
        ({"eps": "1e-8"}, r"optimizer.eps is '1e-8': .*a number"),
        ({"betas": [0.9, 0.95]}, r"optimizer.betas is \[0.9, 0.95\]: .*a tuple of 2, each a number"),
        ({"warmup_steps": 1.5}, r"optimizer.warmup_steps is 1.5: .*an integer"),
        ({"name": "schedule_free"}, r"optimizer.schedule is cosine: expected constant if optimizer.name is schedule_free"),
        ({"max_grad_norm": 0.0}, r"optimizer.max_grad_norm is 0.0"),
    ],
)
def test_invalid_optimizer_options_raise(changes, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**changes)


def test_malformed_config_file_raises(config, tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="does not exist"):
        load_config(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config.json is not a run's configuration"):
        load_config(path)
    save_config(config, path)
    values = json.loads(path.read_text())
    for broken in (values | {"colour": "red"}, values | {"steps": "many"}, {"steps": 3}, []):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"config.json is not a run's configuration"):
            load_config(path)


def test_check_same_run_rejects_changed_options(config, changed):
    check_same_run(config, changed(log_every=7, device="cuda", keep_checkpoints=9))
    with pytest.raises(UserError, match=r"has seed 0, not 1: keep 0"):
        check_same_run(config, changed(seed=1))
    deeper = dataclasses.replace(config.model, num_layers=3)
    with pytest.raises(UserError, match=r"has model.num_layers 2, not 3"):
        check_same_run(config, changed(model=deeper))


def test_config_of_each_phase(changed, tmp_path):
    history = (Change(4, {"batch_size": [4, 6]}), Change(8, {"steps": [12, 20], "optimizer.lr": [1e-2, 5e-3]}))
    optimizer = OptimizerConfig(lr=5e-3, final_lr=1e-3, warmup_steps=3)
    config = changed(steps=20, batch_size=6, micro_batch_size=3, optimizer=optimizer, history=history)
    assert [first for first, _ in config.phases] == [0, 4, 8]
    for step, values in {0: (12, 4, 1e-2), 3: (12, 4, 1e-2), 4: (12, 6, 1e-2), 7: (12, 6, 1e-2), 8: (20, 6, 5e-3)}.items():
        then = config.at(step)
        assert (then.steps, then.batch_size, then.optimizer.lr) == values
    assert (config.since("optimizer.lr"), config.since("batch_size"), config.since("seed")) == (8, 4, 0)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_config_of_an_earlier_version_loads(config, tmp_path):
    path = tmp_path / "config.json"
    save_config(config, path)
    values = json.loads(path.read_text())
    for later in ("history", "batch_start", "batch_warmup_steps", "weights", "sample_every"):
        del values[later]
    values["dtype"] = values.pop("precision")
    (values["data"]["train"],) = values["data"]["train"]
    path.write_text(json.dumps(values))
    assert load_config(path) == config
