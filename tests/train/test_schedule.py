import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train import OptimizerConfig, preset
from tilewright.train.config import Change
from tilewright.train.schedule import batch_size, decay_start, learning_rate, sequences

SCHEDULES = ("cosine", "wsd", "linear")


def all_rates(optimizer, steps, history=()):
    config = dataclasses.replace(preset("stories-cpu"), optimizer=optimizer, steps=steps, history=history)
    return [learning_rate(config, step) for step in range(steps)]


def rates(schedule, steps=101, **options):
    return all_rates(OptimizerConfig(lr=1.0, final_lr=0.1, schedule=schedule, **{"warmup_steps": 10} | options), steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_linear_warmup_and_final_rate(schedule):
    values = rates(schedule)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1.0
    assert values[-1] == 0.1


def test_shapes_of_the_schedules():
    half = 10 + 45
    assert rates("cosine")[half] == pytest.approx(0.55)
    assert rates("cosine")[10 + 30] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert rates("linear")[half] == pytest.approx(0.55)
    assert rates("linear")[10 + 30] == pytest.approx(0.1 + 0.9 * 2 / 3)
    wsd = rates("wsd", decay_share=0.2)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.55, abs=0.01)
    assert rates("wsd", decay_share=1.0) == pytest.approx(rates("linear"))


def test_rate_can_decay_to_zero():
    config = OptimizerConfig(lr=1.0, final_lr=0.0, schedule="linear", warmup_steps=0)
    assert all_rates(config, 5) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_constant_rate():
    assert rates("constant")[10:] == [1.0] * 91


@pytest.mark.parametrize(("schedule", "same"), [("constant", 100), ("wsd", 80)])
def test_more_steps_change_no_rate_before_the_decay(schedule, same):
    shorter, longer = rates(schedule, 100), rates(schedule, 200)
    assert shorter[:same] == longer[:same]
    config = dataclasses.replace(preset("stories-cpu"), steps=100, optimizer=OptimizerConfig(schedule="wsd", warmup_steps=10))
    assert decay_start(config) == 79


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_restarted_schedule_has_no_warmup(schedule):
    optimizer = OptimizerConfig(lr=0.5, final_lr=0.1, schedule=schedule, warmup_steps=10)
    history = (Change(101, {"steps": [101, 181], "optimizer.lr": [1.0, 0.5]}),)
    values = all_rates(optimizer, 181, history)
    assert values[:101] == rates(schedule)
    alone = dataclasses.replace(optimizer, warmup_steps=0)
    assert values[101:] == all_rates(alone, 80)
    assert (values[101], values[-1]) == (0.5, 0.1)


def test_batch_warmup_doubles_in_equal_parts():
    config = dataclasses.replace(preset("stories-cpu"), batch_size=32, batch_start=4, batch_warmup_steps=10)
    sizes = [batch_size(config, step) for step in range(12)]
    assert sizes == [4, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32]
    assert [sequences(config, 0, step) for step in range(13)] == [sum(sizes[:step]) for step in range(13)]
    assert sequences(config, 5, 11) == sum(sizes[5:11])


def test_sequences_of_all_phases_are_counted():
    history = (Change(3, {"batch_size": [8, 4]}), Change(5, {"batch_size": [4, 16]}))
    config = dataclasses.replace(preset("stories-cpu"), batch_size=16, history=history)
    sizes = [batch_size(config, step) for step in range(8)]
    assert sizes == [8, 8, 8, 4, 4, 16, 16, 16]
    assert all(sequences(config, a, b) == sum(sizes[a:b]) for a in range(8) for b in range(a, 9))


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 50),
    st.integers(0, 49),
    st.floats(0, 1),
    st.floats(0.001, 1),
)
def test_rates_rise_to_the_peak_then_never_rise(schedule, steps, warmup, final, share):
    warmup = min(warmup, steps - 1)
    config = OptimizerConfig(lr=1.0, final_lr=final, schedule=schedule, warmup_steps=warmup, decay_share=share)
    values = all_rates(config, steps)
    assert values[-1] == final
    assert all(0 <= value <= 1 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
