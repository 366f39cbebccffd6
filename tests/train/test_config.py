import dataclasses
import json

import pytest

from tilewright.errors import UserError
from tilewright.model import ModelConfig
from tilewright.train import PRESETS, OptimizerConfig, preset
from tilewright.train.config import Change, load_config, save_config
from tilewright.train.extension import check_same_run


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_disk(name, tmp_path):
    save_config(preset(name), tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == preset(name)


def test_the_course_run_sees_the_courses_tokens():
    config = preset("tinystories-17m")
    assert config.steps * config.tokens_per_step == 327_680_000


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'gpt3' is unknown: choose one of stories-cpu, tinystories-17m"):
        preset("gpt3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size is 4: it must be a divisor of batch_size, 6"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"steps": 3}, "warmup_steps is 3: it must be below steps, 3"),
        ({"seed": -1}, "seed is -1"),
        ({"precision": "float16"}, "precision is 'float16': it must be one of auto, float32, bfloat16, fp8"),
        (
            {"cuda_graphs": True, "precision": "float32", "model": ModelConfig(300, 16, 16, 2, 2, 24, num_experts=2)},
            "precision is '?float32'?: it must be bfloat16 where cuda_graphs is set, with experts",
        ),
        ({"steps": 3.0}, "steps is 3.0: it must be an integer"),
        ({"steps": True}, "steps is True: it must be an integer"),
        ({"z_loss": float("nan")}, "z_loss is nan: it must be a number"),
        ({"batch_size": "all"}, "batch_size is 'all': it must be an integer or auto"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1: it must be true or false"),
        ({"out": "runs/mine"}, "out is 'runs/mine': it must be a Path"),
        ({"batch_start": 3, "batch_warmup_steps": 4}, "batch_start is 3: it must be batch_size, 4, halved"),
        ({"batch_start": 2}, "batch_warmup_steps is 0: it must be above 0 where batch_start is set"),
        ({"batch_start": 1, "batch_warmup_steps": 4, "micro_batch_size": 2}, "micro_batch_size is 2: .* of batch_start, 1"),
        ({"parallel": "tp"}, "parallel is tp: it must be ddp or fsdp, alone or with tp=N"),
    ],
)
def test_impossible_runs_are_refused(changed, changes, message):
    with pytest.raises(UserError, match=message):
        changed(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, r"optimizer.lr is 0.0: it must be a finite number above 0"),
        ({"lr": float("nan")}, r"optimizer.lr is nan"),
        ({"final_lr": 1.0}, r"optimizer.final_lr is 1.0: it must be between 0 and lr"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas is \(0.9, 1.0\)"),
        ({"weight_decay": -0.1}, r"optimizer.weight_decay is -0.1"),
        ({"name": "lion"}, "optimizer.name is 'lion': it must be one of adamw, muon"),
        ({"schedule": "sine"}, "optimizer.schedule is 'sine': it must be one of cosine, wsd, linear"),
        ({"eps": float("inf")}, r"optimizer.eps is inf: it must be a finite number above 0"),
        ({"eps": "1e-8"}, r"optimizer.eps is '1e-8': it must be a number"),
        ({"betas": [0.9, 0.95]}, r"optimizer.betas is \[0.9, 0.95\]: it must be a tuple of 2, each a number"),
        ({"warmup_steps": 1.5}, r"optimizer.warmup_steps is 1.5: it must be an integer"),
        ({"name": "schedule_free"}, r"optimizer.schedule is cosine: it must be constant where optimizer.name is schedule_free"),
        ({"max_grad_norm": 0.0}, r"optimizer.max_grad_norm is 0.0"),
    ],
)
def test_impossible_optimizers_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**changes)


def test_a_broken_configuration_is_named(config, tmp_path):
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


def test_a_run_goes_on_only_as_it_began(config, changed):
    check_same_run(config, changed(log_every=7, device="cuda", keep_checkpoints=9))
    with pytest.raises(UserError, match=r"has seed 0, not 1: resume it with 0"):
        check_same_run(config, changed(seed=1))
    deeper = dataclasses.replace(config.model, num_layers=3)
    with pytest.raises(UserError, match=r"has model.num_layers 2, not 3"):
        check_same_run(config, changed(model=deeper))


def test_the_settings_of_each_part_of_a_run_are_known(changed, tmp_path):
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


def test_a_configuration_of_an_earlier_version_is_read(config, tmp_path):
    path = tmp_path / "config.json"
    save_config(config, path)
    values = json.loads(path.read_text())
    for later in ("history", "batch_start", "batch_warmup_steps", "weights", "sample_every"):
        del values[later]
    values["dtype"] = values.pop("precision")
    (values["data"]["train"],) = values["data"]["train"]
    path.write_text(json.dumps(values))
    assert load_config(path) == config
