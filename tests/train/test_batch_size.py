import dataclasses
from pathlib import Path

import pytest

from tilewright.errors import UserError
from tilewright.model.accounting import Policy, training_memory
from tilewright.train import preset
from tilewright.train.batch_size import USABLE, fit_memory

GPU = 140 * 10**9


@pytest.fixture
def xl():
    return dataclasses.replace(preset("gpt2-xl"), out=Path("runs/xl"), dtype="bfloat16", device="cpu")


def peak(config, micro, checkpointing="none", accumulate=False):
    policy = Policy(compute="bfloat16", checkpointing=checkpointing, vocabulary="padded")
    return training_memory(config.model, micro, policy=policy, accumulate=accumulate).peak


def test_nothing_is_asked_of_a_configuration_of_numbers(xl):
    assert fit_memory(xl, None) is xl


def test_the_largest_batch(xl):
    config = fit_memory(dataclasses.replace(xl, batch_size="auto", micro_batch_size=None), GPU)
    assert config.batch_size == config.micro_batch_size
    assert peak(xl, config.batch_size) <= USABLE * GPU < peak(xl, config.batch_size + 1)
    both = fit_memory(dataclasses.replace(xl, batch_size="auto", micro_batch_size=None), GPU, num_gpus=2)
    assert (both.batch_size, both.micro_batch_size) == (2 * config.batch_size, config.batch_size)


def test_the_largest_micro_batch_divides_the_share_of_a_gpu(xl):
    config = fit_memory(dataclasses.replace(xl, micro_batch_size="auto", batch_size=48), GPU)
    micro = config.micro_batch_size
    assert config.batch_size == 48
    assert 48 % micro == 0
    assert peak(xl, micro, accumulate=micro < 48) <= USABLE * GPU
    larger = min(size for size in range(micro + 1, 49) if 48 % size == 0)
    assert peak(xl, larger, accumulate=larger < 48) > USABLE * GPU
    shared = fit_memory(dataclasses.replace(xl, micro_batch_size="auto", batch_size=48), GPU, num_gpus=48)
    assert shared.micro_batch_size == 1


def test_blocks_are_checkpointed_only_where_memory_demands_it(xl):
    config = dataclasses.replace(xl, activation_checkpointing="auto", micro_batch_size=8)
    assert fit_memory(config, GPU).activation_checkpointing == "none"
    small = int(peak(xl, 8, "block", accumulate=True) / USABLE) + 10**6
    assert peak(xl, 8, accumulate=True) > small
    assert fit_memory(config, small).activation_checkpointing == "block"


def test_the_mean_of_the_weights_takes_its_room(xl):
    config = dataclasses.replace(xl, batch_size="auto", micro_batch_size=None)
    with_mean = fit_memory(dataclasses.replace(config, ema_decay=0.999), GPU)
    assert with_mean.batch_size < fit_memory(config, GPU).batch_size


def test_what_does_not_fit_is_said_before_anything_is_made(xl):
    with pytest.raises(UserError, match=r"a step of xl does not fit in 20.0 GB"):
        fit_memory(dataclasses.replace(xl, micro_batch_size="auto", activation_checkpointing="auto"), 20 * 10**9)
    with pytest.raises(UserError, match="batch_size is auto: that needs a GPU, whose memory is known"):
        fit_memory(dataclasses.replace(xl, batch_size="auto"), None)
