import dataclasses
import json

import pytest

from tilewright.errors import UserError
from tilewright.train import PRESETS, OptimizerConfig, preset
from tilewright.train.config import check_same_run, load_config, save_config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_disk(name, tmp_path):
    save_config(preset(name), tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == preset(name)


def test_the_course_run_sees_the_courses_tokens():
    config = preset("tinystories-17m")
    assert config.steps * config.tokens_per_step == 327_680_000


def test_cuda_graphs_take_a_whole_batch(changed):
    for sizes in ((4, None), (4, 4), (4, "auto"), ("auto", 2), ("auto", "auto")):
        assert changed(cuda_graphs=True, batch_size=sizes[0], micro_batch_size=sizes[1]).cuda_graphs


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
        ({"dtype": "float16"}, "dtype is float16: it must be one of auto, float32, bfloat16"),
        ({"parallel": "tp"}, "parallel is tp: it must be one of ddp, fsdp"),
        ({"cuda_graphs": True, "compile": False}, "compile is False: it must be left out, or true, where cuda_graphs is set"),
        ({"cuda_graphs": True, "micro_batch_size": 2}, "micro_batch_size is 2: it must be left out, or 4, where cuda_graphs"),
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
        ({"name": "lion"}, "optimizer.name is lion: it must be one of adamw, muon"),
        ({"schedule": "sine"}, "optimizer.schedule is sine: it must be one of cosine, wsd, linear"),
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
