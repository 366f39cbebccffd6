import pytest

from tilewright.train.schedule import cosine_with_warmup


def rates(warmup_steps, total_steps):
    return [cosine_with_warmup(step, 1.0, 0.1, warmup_steps, total_steps) for step in range(total_steps)]


def test_warm_up_is_a_line_to_the_peak():
    assert rates(4, 20)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_to_the_final_rate():
    values = rates(4, 21)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[12] == pytest.approx(0.55)  # half way down after half of the way
    assert values[-1] == 0.1


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_short_runs(warmup_steps, total_steps):
    values = rates(warmup_steps, total_steps)
    assert values[-1] == 0.1
    assert all(0 < value <= 1 for value in values)


def test_beyond_the_end_it_stays():
    assert cosine_with_warmup(99, 1.0, 0.1, 4, 20) == 0.1
