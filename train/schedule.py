"""The learning rate over the steps of a run."""

import math


def cosine_with_warmup(step: int, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of `step` (0-based): a line from 0 up to `peak`, then half a cosine down to `final`.

    As in Touvron et al. 2023, section 2.2; the last step, total_steps - 1, has the final rate exactly.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps - 1:
        return final
    progress = (step - warmup_steps) / (total_steps - 1 - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
