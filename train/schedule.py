"""The learning rate over the steps of a run."""

import math

from .config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (0-based): a line from 0 up to `lr`, then down to `final_lr`, that of the last step.

    cosine: half a cosine (Touvron et al. 2023, section 2.2). wsd: constant, then a line over the last `decay_share` of all
    steps (Hu et al. 2024, section 4; Hägele et al. 2024). linear: a line all the way (Bergsma et al. 2025, whose end is zero).
    """
    last, warmup = total_steps - 1, config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if step >= last:
        return config.final_lr
    start = warmup if config.schedule != "wsd" else max(warmup, round(last - config.decay_share * total_steps))
    progress = max(0.0, (step - start) / max(1, last - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr + (config.lr - config.final_lr) * left
