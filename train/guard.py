"""Decide on the device which steps to skip: those with a non-finite loss or a loss spike."""

import torch
from torch import Tensor

HISTORY = 128
MIN_HISTORY = 32


class Guard:
    """Decides for each step whether to skip it, without synchronizing with the host.

    A step is skipped if its loss or gradient norm is not finite. Once 32 losses are recorded, a step is also skipped if its
    loss is more than `deviations` standard deviations above the mean of the last 128 losses that were not skipped (as in OLMo's
    skip-step optimizer; OLMo team 2024, section 3.1). The recorded losses are part of the checkpoint.
    """

    def __init__(self, device: torch.device, deviations: float | None) -> None:
        self._deviations = deviations
        self.losses = torch.zeros(HISTORY, device=device)
        # int64: steps taken, steps skipped, consecutive skipped steps up to now, and the maximum of these since the last
        # check by `DivergenceCheck`.
        self.taken, self.skipped, self.in_a_row, self.most_in_a_row = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)
        )

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return whether to skip the step, as a boolean on the device, and record its loss."""
        loss = loss.float()
        skip = ~(loss.isfinite() & grad_norm.isfinite())
        if self._deviations is not None:
            known = self.taken.clamp(max=HISTORY)
            is_known = torch.arange(HISTORY, device=loss.device) < known
            mean = self.losses.sum() / known
            variance = torch.where(is_known, self.losses - mean, 0).square().sum() / known
            # If the loss is nearly constant, rounding must not count as a spike.
            deviation = variance.sqrt().clamp(min=1e-3)
            skip = skip | ((known >= MIN_HISTORY) & (loss > mean + self._deviations * deviation))
        slot = (self.taken % HISTORY).view(1)
        self.losses.index_copy_(0, slot, torch.where(skip, self.losses[slot], loss.view(1)))
        self.taken += ~skip
        self.skipped += skip
        self.in_a_row.copy_(torch.where(skip, self.in_a_row + 1, 0))
        self.most_in_a_row.copy_(torch.maximum(self.most_in_a_row, self.in_a_row))
        return skip

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, by name."""
        names = ("losses", "taken", "skipped", "in_a_row", "most_in_a_row")
        return {name: getattr(self, name) for name in names}
