"""Kill whole runs with SIGKILL at any file operation; the resumed run must equal an uninterrupted one."""

import dataclasses
import random
import signal

import pytest

from faults import outcome, run_in_child, train_until_killed
from tilewright.model import ModelConfig
from tilewright.tokenizer import Tokenizer
from tilewright.train.data.datasets import open_data
from tilewright.train.folder import CONFIG_FILE

# Allows for a slow or busy machine.
pytestmark = pytest.mark.timeout(600)

long = pytest.mark.long


@pytest.fixture
def saving(config):
    """A run that saves often, and spends about as much time saving as computing."""
    open_data(config.data, Tokenizer.load(config.data.tokenizer))
    model = ModelConfig(vocab_size=300, context_length=16, d_model=64, num_layers=2, num_heads=2, d_ff=128)
    return dataclasses.replace(config, model=model, steps=4, checkpoint_every=2, keep_checkpoints=1)


def uninterrupted(config):
    whole = dataclasses.replace(config, out=config.out.with_name("whole"))
    status, printed = run_in_child(train_until_killed, whole)
    assert status == 0, printed
    return outcome(whole.out), int(printed.split()[-1])


def leftovers(run):
    return [path.name for path in run.rglob(".*") if path.name != ".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("every", [pytest.param(1, marks=long), 7])
def test_run_resumes_after_a_kill_at_any_file_operation(saving, every):
    expected, num_operations = uninterrupted(saving)
    assert num_operations > 40
    before_it_began = 0
    for kill_at in range(0, num_operations, every):
        config = dataclasses.replace(saving, out=saving.out.with_name(f"killed-{kill_at}"))
        status, printed = run_in_child(train_until_killed, config, kill_at)
        assert status == -signal.SIGKILL, printed
        before_it_began += not (config.out / CONFIG_FILE).exists()
        status, printed = run_in_child(train_until_killed, config)
        assert status == 0, printed
        assert outcome(config.out) == expected, kill_at
        assert leftovers(config.out) == []
    # Kills happened during folder creation, during the first save, and later.
    assert 10 / every < before_it_began < (num_operations - 20) / every


@pytest.mark.slow
@pytest.mark.parametrize("kills", [pytest.param(100, marks=long), 10])
def test_run_killed_many_times_equals_an_uninterrupted_run(saving, kills):
    # A start takes 6 operations, and two steps with a checkpoint take 16, of a few milliseconds each, so the kills never reach
    # the end of the run.
    config = dataclasses.replace(saving, steps=4 * kills)
    expected, _ = uninterrupted(config)
    rng = random.Random(0)
    half_saved = 0
    for _ in range(kills):
        moment = rng.randrange(50), rng.choice((0.0, rng.uniform(0, 5e-3)))
        status, printed = run_in_child(train_until_killed, config, *moment)
        assert status == -signal.SIGKILL, printed
        half_saved += any((config.out / "checkpoints").glob(".step-*.tmp"))
    assert half_saved >= kills // 5
    status, printed = run_in_child(train_until_killed, config)
    assert status == 0, printed
    assert outcome(config.out) == expected
    assert leftovers(config.out) == []
