import dataclasses
from pathlib import Path

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.model.accounting import Policy, training_memory
from tilewright.train import TrainConfig, preset
from tilewright.train.batch_size import USABLE, fit_memory
from tilewright.train.config import load_config, save_config, with_options
from tilewright.train.extension import check_same_run

GPU = 140 * 10**9


@pytest.fixture
def xl():
    return dataclasses.replace(preset("gpt2-xl"), out=Path("runs/xl"), precision="bfloat16", device="cpu")


def peak(config, micro, checkpointing="none", accumulate=False):
    policy = Policy(compute="bfloat16", checkpointing=checkpointing, vocabulary="padded")
    return training_memory(config.model, micro, policy=policy, accumulate=accumulate).peak


def test_fit_memory_returns_config_without_auto_unchanged(xl):
    assert fit_memory(xl, None) is xl


def test_auto_batch_size_is_the_largest_that_fits(xl):
    config = fit_memory(dataclasses.replace(xl, batch_size="auto", micro_batch_size=None), GPU)
    assert config.batch_size == config.micro_batch_size
    assert peak(xl, config.batch_size) <= USABLE * GPU < peak(xl, config.batch_size + 1)
    both = fit_memory(dataclasses.replace(xl, batch_size="auto", micro_batch_size=None), GPU, num_gpus=2)
    assert (both.batch_size, both.micro_batch_size) == (2 * config.batch_size, config.batch_size)


@pytest.mark.parametrize(
    ("options", "policy"), [({"weights": "bfloat16"}, {"weights": "bfloat16"}), ({"states": "8bit"}, {"moments": "8bit"})]
)
def test_smaller_weights_and_states_allow_larger_batches(xl, options, policy):
    changes = {name: value for name, value in options.items() if name == "weights"}
    optimizer = dataclasses.replace(xl.optimizer, states=options.get("states", "float32"))
    config = dataclasses.replace(xl, batch_size="auto", micro_batch_size=None, optimizer=optimizer, **changes)
    found = fit_memory(config, GPU).batch_size
    own = Policy(compute="bfloat16", vocabulary="padded", **policy)
    peaks = [training_memory(xl.model, size, policy=own).peak for size in (found, found + 1)]
    assert peaks[0] <= USABLE * GPU < peaks[1]
    assert found > fit_memory(dataclasses.replace(xl, batch_size="auto", micro_batch_size=None), GPU).batch_size


def test_auto_micro_batch_is_the_largest_divisor_that_fits(xl):
    config = fit_memory(dataclasses.replace(xl, micro_batch_size="auto", batch_size=48), GPU)
    micro = config.micro_batch_size
    assert config.batch_size == 48
    assert 48 % micro == 0
    assert peak(xl, micro, accumulate=micro < 48) <= USABLE * GPU
    larger = min(size for size in range(micro + 1, 49) if 48 % size == 0)
    assert peak(xl, larger, accumulate=larger < 48) > USABLE * GPU
    shared = fit_memory(dataclasses.replace(xl, micro_batch_size="auto", batch_size=48), GPU, num_gpus=48)
    assert shared.micro_batch_size == 1


def test_auto_checkpointing_only_if_memory_requires_it(xl):
    config = dataclasses.replace(xl, activation_checkpointing="auto", micro_batch_size=8)
    assert fit_memory(config, GPU).activation_checkpointing == "none"
    small = int(peak(xl, 8, "block", accumulate=True) / USABLE) + 10**6
    assert peak(xl, 8, accumulate=True) > small
    assert fit_memory(config, small).activation_checkpointing == "block"


@settings(derandomize=True, deadline=None, max_examples=20)
@given(share=st.floats(0, 1), micro=st.sampled_from([1, 2, 4, 8, 16]))
def test_auto_checkpoints_the_fewest_blocks_that_fit(share, micro):
    small = dataclasses.replace(preset("gpt2-small"), out=Path("runs/small"), precision="bfloat16", device="cpu")
    config = dataclasses.replace(small, activation_checkpointing="auto", batch_size=16, micro_batch_size=micro)
    peaks = [peak(config, micro, blocks, accumulate=micro < 16) for blocks in range(13)]
    memory = int((min(peaks) + share * (max(peaks) - min(peaks))) / USABLE) + 1
    fewest = next(blocks for blocks, held in enumerate(peaks) if held <= USABLE * memory)
    resolved = fit_memory(config, memory)
    assert resolved.activation_checkpointing == {0: "none", 12: "block"}.get(fewest, fewest)
    assert fit_memory(resolved, memory) is resolved
    with pytest.raises(UserError, match="does not fit"):
        fit_memory(config, int(min(peaks) / USABLE) - 1)


@pytest.mark.parametrize("batch_size", [48, "auto"])
def test_auto_sizes_shrink_before_blocks_are_checkpointed(xl, batch_size):
    # The context is so long that activations take more memory than gradients.
    long = dataclasses.replace(xl, model=dataclasses.replace(xl.model, context_length=4096), micro_batch_size="auto")
    config = dataclasses.replace(long, activation_checkpointing="auto", batch_size=batch_size)
    large = fit_memory(config, GPU)
    assert large.activation_checkpointing == "none"
    assert 1 < large.micro_batch_size < 48
    # Not even one sequence fits without checkpointing, so as many blocks are checkpointed as one sequence needs.
    accumulate = batch_size == 48
    memory = int(peak(long, 1, 7, accumulate) / USABLE) + 1
    assert peak(long, 1, 6, accumulate) > USABLE * memory
    small = fit_memory(config, memory)
    assert (small.activation_checkpointing, small.micro_batch_size) == (7, 1)
    # As when the run is resumed.
    assert fit_memory(dataclasses.replace(config, batch_size=small.batch_size), memory) == small


def test_explicit_number_of_blocks_is_kept(xl):
    config = dataclasses.replace(xl, activation_checkpointing=20, batch_size="auto", micro_batch_size=None)
    resolved = fit_memory(config, GPU)
    assert resolved.activation_checkpointing == 20
    sizes = [fit_memory(dataclasses.replace(config, activation_checkpointing=n), GPU).batch_size for n in ("none", 20, "block")]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[1] == resolved.batch_size


def test_number_of_blocks_round_trips_through_cli_and_config_file(xl, tmp_path):
    config = tyro.cli(TrainConfig, default=xl, args=["--activation-checkpointing", "17"])
    assert config.activation_checkpointing == 17
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert with_options(xl, {"activation_checkpointing": 17}) == config
    check_same_run(xl, config)


@pytest.mark.parametrize("value", [-1, 49, True, "all"])
def test_invalid_numbers_of_blocks_raise(xl, value):
    with pytest.raises(UserError, match=f"activation_checkpointing is {value!r}: .*none, block, auto"):
        dataclasses.replace(xl, activation_checkpointing=value)


def test_ema_is_part_of_the_memory(xl):
    config = dataclasses.replace(xl, batch_size="auto", micro_batch_size=None)
    with_ema = fit_memory(dataclasses.replace(config, ema_decay=0.999), GPU)
    assert with_ema.batch_size < fit_memory(config, GPU).batch_size


def test_error_if_nothing_fits(xl):
    for checkpointing, advice in (("auto", "size$"), ("block", "size$"), (4, "size, or --activation-checkpointing auto$")):
        config = dataclasses.replace(xl, micro_batch_size="auto", activation_checkpointing=checkpointing)
        with pytest.raises(UserError, match=rf"a step of xl does not fit in 20.0 GB: use .*{advice}"):
            fit_memory(config, 20 * 10**9)
    with pytest.raises(UserError, match="batch_size is auto, which needs a GPU: expected a number"):
        fit_memory(dataclasses.replace(xl, batch_size="auto"), None)
