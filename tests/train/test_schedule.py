import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train import OptimizerConfig
from tilewright.train.schedule import learning_rate

SCHEDULES = ("cosine", "wsd", "linear")


def rates(schedule, steps=101, **options):
    config = OptimizerConfig(lr=1.0, final_lr=0.1, schedule=schedule, **{"warmup_steps": 10} | options)
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_and_the_last_step_has_the_final_rate(schedule):
    values = rates(schedule)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1.0
    assert values[-1] == 0.1


def test_the_shapes():
    half = 10 + 45
    assert rates("cosine")[half] == pytest.approx(0.55)
    assert rates("cosine")[10 + 30] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert rates("linear")[half] == pytest.approx(0.55)
    assert rates("linear")[10 + 30] == pytest.approx(0.1 + 0.9 * 2 / 3)
    wsd = rates("wsd", decay_share=0.2)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.55, abs=0.01)
    assert rates("wsd", decay_share=1.0) == pytest.approx(rates("linear"))


def test_the_rate_can_fall_to_zero():
    config = OptimizerConfig(lr=1.0, final_lr=0.0, schedule="linear", warmup_steps=0)
    assert [learning_rate(config, step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 50),
    st.integers(0, 49),
    st.floats(0, 1),
    st.floats(0.001, 1),
)
def test_rates_rise_to_the_peak_and_never_rise_again(schedule, steps, warmup, final, share):
    warmup = min(warmup, steps - 1)
    config = OptimizerConfig(lr=1.0, final_lr=final, schedule=schedule, warmup_steps=warmup, decay_share=share)
    values = [learning_rate(config, step, steps) for step in range(steps)]
    assert values[-1] == final
    assert all(0 <= value <= 1 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
