import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.train.guard import HISTORY, MIN_HISTORY, Guard

CPU = torch.device("cpu")


def judge(guard, loss, norm=1.0):
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def counts(guard):
    return {name: int(getattr(guard, name)) for name in ("taken", "skipped", "in_a_row", "most_in_a_row")}


@pytest.mark.parametrize("deviations", [None, 6.0])
def test_non_finite_loss_or_gradient_is_skipped(deviations):
    guard = Guard(CPU, deviations)
    assert not judge(guard, 3.0)
    assert judge(guard, math.nan)
    assert judge(guard, math.inf)
    assert judge(guard, 3.0, math.nan)
    assert judge(guard, 3.0, math.inf)
    assert not judge(guard, 3.0)
    assert judge(guard, math.nan)
    assert counts(guard) == {"taken": 2, "skipped": 5, "in_a_row": 1, "most_in_a_row": 4}


def test_spike_is_skipped_once_enough_losses_are_recorded():
    losses = [3 + 0.1 * math.sin(step) for step in range(2 * HISTORY)]
    guard = Guard(CPU, 6.0)
    for loss in losses[: MIN_HISTORY - 1]:
        assert not judge(guard, loss)
    assert not Guard(CPU, 6.0).judge(torch.tensor(100.0), torch.tensor(1.0))
    for loss in losses[MIN_HISTORY - 1 :]:
        assert not judge(guard, loss)
    # The standard deviation of a sine is its amplitude over sqrt(2).
    deviation = 0.1 / math.sqrt(2)
    assert not judge(guard, 3 + 5.5 * deviation)
    assert judge(guard, 3 + 6.8 * deviation)
    assert judge(guard, 50.0)
    assert not judge(guard, 0.0), "a decrease is not a spike"
    none = Guard(CPU, None)
    assert not any(judge(none, loss) for loss in [*losses, 50.0])


def test_rounding_of_a_constant_loss_is_not_a_spike():
    guard = Guard(CPU, 6.0)
    for _ in range(HISTORY):
        judge(guard, 2.0)
    assert not judge(guard, 2.0 + 1e-5)


@given(st.lists(st.floats(0, 10, width=32) | st.just(math.nan), max_size=3 * MIN_HISTORY))
def test_history_excludes_skipped_losses(losses):
    guard = Guard(CPU, 3.0)
    kept = []
    for loss in losses:
        skip = judge(guard, loss)
        expected = math.isnan(loss)
        if len(kept) >= MIN_HISTORY and not expected:
            known = torch.tensor(kept[-HISTORY:], dtype=torch.float64)
            border = float(known.mean() + 3 * known.std(correction=0).clamp(min=1e-3))
            if abs(loss - border) < 1e-4:
                expected = skip  # too close to the threshold for float32
            else:
                expected = loss > border
        assert skip == expected
        if not skip:
            kept.append(loss)
    assert int(guard.taken) == len(kept)


def test_state_round_trips():
    first, second = Guard(CPU, 6.0), Guard(CPU, 6.0)
    for step in range(HISTORY + 7):
        judge(first, math.nan if step % 5 == 0 else 3 + 0.1 * math.sin(step))
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    for loss in (3.0, 4.0, math.nan, 3.1):
        assert judge(first, loss) == judge(second, loss)
    assert counts(first) == counts(second)
    assert torch.equal(first.losses, second.losses)
