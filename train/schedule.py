"""What changes over the steps of a run: the learning rate, and the batch size."""

import itertools
import math
from collections.abc import Callable

from .config import OptimizerConfig, TrainConfig

# What is left of the fall from `lr` to `final_lr`, by how far it has come from 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    # Touvron et al. 2023, section 2.2.
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Hu et al. 2024, section 4; Hägele et al. 2024: the fall begins late, see `decay_start`.
    "wsd": lambda progress: 1 - progress,
    # Bergsma et al. 2025, whose end is zero.
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0, by the settings that the run had then.

    A line from 0 up to `lr`, then down to `final_lr`, that of the last step, by the schedule. Where an extension has begun the
    schedule anew, it begins at `lr` without a warm-up (Gupta et al. 2023: its length makes no difference there) and counts its
    steps from there.
    """
    then = config.at(step)
    begin, optimizer = then.since("optimizer.lr"), then.optimizer
    step, steps, warmup = step - begin, then.steps - begin, optimizer.warmup_steps if begin == 0 else 0
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    fall = SCHEDULES[optimizer.schedule]
    if step >= steps - 1:
        left = fall(1.0)
    else:
        start = _fall_start(optimizer, steps, warmup)
        left = fall(max(0.0, (step - start) / max(1, steps - 1 - start)))
    return optimizer.final_lr + (optimizer.lr - optimizer.final_lr) * left


def _fall_start(optimizer: OptimizerConfig, steps: int, warmup: int) -> int:
    if optimizer.schedule != "wsd":
        return warmup
    return max(warmup, round(steps - 1 - optimizer.decay_share * steps))


def decay_start(config: TrainConfig) -> int | None:
    """Return the last step, counted from 0, to which wsd gives the peak learning rate: the decay begins after it.

    None for the other schedules.
    """
    if config.optimizer.schedule != "wsd":
        return None
    begin = config.since("optimizer.lr")
    return begin + _fall_start(config.optimizer, config.steps - begin, config.optimizer.warmup_steps if begin == 0 else 0)


def batch_size(config: TrainConfig, step: int) -> int:
    """Return the sequences of a step, counted from 0, by the settings that the run had then.

    In a warm-up they double, in parts of equal length (Smith et al. 2018; Merrill et al. 2025).
    """
    then = config.at(step)
    return then.smallest_batch << sum(border <= step for border in _doublings(then))


def _doublings(config: TrainConfig) -> list[int]:
    """Return the first step of each size but the smallest."""
    assert config.batch_size != "auto"
    number = (config.batch_size // config.smallest_batch).bit_length() - 1
    return [math.ceil(i * config.batch_warmup_steps / number) for i in range(1, number + 1)]


def sequences(config: TrainConfig, first: int, last: int) -> int:
    """Return how many sequences the steps in range(first, last) read."""
    borders = {border for begin, then in config.phases for border in (begin, *_doublings(then))}
    borders = sorted({first, last, *(border for border in borders if first < border < last)})
    return sum((end - begin) * batch_size(config, begin) for begin, end in itertools.pairwise(borders))
