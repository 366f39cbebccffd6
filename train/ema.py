"""A running mean of the weights, which validates better than the weights themselves while the learning rate is high."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightMean:
    """The mean of a model's weights that forgets at `decay` a step (Polyak & Juditsky 1992; Morales-Brotons et al. 2024).

    In the first steps it forgets faster, min(decay, (1 + t) / (10 + t)), so that the initial weights do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step` steps in."""
        decay = min(self._decay, (1 + step) / (10 + step))
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        lerp(list(self.weights.values()), list(self._parameters.values()), 1 - decay)

    @contextmanager
    def in_place_of_the_weights(self) -> Iterator[None]:
        """Let the model compute with the mean while the context lasts."""
        # Copied, not exchanged: a captured graph reads the weights where they lie.
        own = [parameter.detach().clone() for parameter in self._parameters.values()]
        with torch.no_grad():
            self._put(self.weights.values())
            try:
                yield
            finally:
                self._put(own)

    def _put(self, weights: Iterable[Tensor]) -> None:
        for parameter, weight in zip(self._parameters.values(), weights, strict=True):
            parameter.copy_(weight)
