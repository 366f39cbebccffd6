"""Learning-rate and batch-size schedules."""

import itertools
import math
from collections.abc import Callable

from .config import OptimizerConfig, TrainConfig

# Remaining fraction of `lr - final_lr`, as a function of the progress of the decay from 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    # Touvron et al. 2023, section 2.2.
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    # Hu et al. 2024, section 4; Hägele et al. 2024. The decay begins late, see `decay_start`.
    "wsd": lambda progress: 1 - progress,
    # Bergsma et al. 2025, who decay to zero.
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0, with the settings in effect at that step.

    The rate rises linearly from 0 to `lr`, then follows the schedule to `final_lr` at the last step. If an extension restarted
    the schedule, it starts at `lr` without a warm-up (Gupta et al. 2023 find that its length makes no difference), and its
    steps count from the restart.
    """
    then = config.at(step)
    begin, optimizer = then.since("optimizer.lr"), then.optimizer
    step, steps, warmup = step - begin, then.steps - begin, optimizer.warmup_steps if begin == 0 else 0
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    decay = SCHEDULES[optimizer.schedule]
    if step >= steps - 1:
        remaining = decay(1.0)
    else:
        start = _relative_decay_start(optimizer, steps, warmup)
        remaining = decay(max(0.0, (step - start) / max(1, steps - 1 - start)))
    return optimizer.final_lr + (optimizer.lr - optimizer.final_lr) * remaining


def _relative_decay_start(optimizer: OptimizerConfig, steps: int, warmup: int) -> int:
    if optimizer.schedule != "wsd":
        return warmup
    return max(warmup, round(steps - 1 - optimizer.decay_share * steps))


def decay_start(config: TrainConfig) -> int | None:
    """Return the last step, counted from 0, at the peak learning rate of a wsd schedule; None for other schedules."""
    if config.optimizer.schedule != "wsd":
        return None
    begin = config.since("optimizer.lr")
    return begin + _relative_decay_start(
        config.optimizer, config.steps - begin, config.optimizer.warmup_steps if begin == 0 else 0
    )


def batch_size(config: TrainConfig, step: int) -> int:
    """Return the number of sequences of a step, counted from 0, with the settings in effect at that step.

    During the batch warm-up it doubles after equal numbers of steps (Smith et al. 2018; Merrill et al. 2025).
    """
    then = config.at(step)
    return then.smallest_batch << sum(first <= step for first in _doublings(then))


def _doublings(config: TrainConfig) -> list[int]:
    """Return the first step of each batch size except the smallest."""
    assert config.batch_size != "auto"
    number = (config.batch_size // config.smallest_batch).bit_length() - 1
    return [math.ceil(i * config.batch_warmup_steps / number) for i in range(1, number + 1)]


def sequences(config: TrainConfig, first: int, last: int) -> int:
    """Return the number of sequences that the steps in range(first, last) read."""
    borders = {border for begin, then in config.phases for border in (begin, *_doublings(then))}
    borders = sorted({first, last, *(border for border in borders if first < border < last)})
    return sum((end - begin) * batch_size(config, begin) for begin, end in itertools.pairwise(borders))
