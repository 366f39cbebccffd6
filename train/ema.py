"""A running mean of the weights, which validates better than the weights themselves while the learning rate is high."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class WeightMean:
    """The mean of a model's weights that forgets at `decay` a step (Polyak & Juditsky 1992; Morales-Brotons et al. 2024).

    In the first steps it forgets faster, min(decay, (1 + t) / (10 + t)), so that the initial weights do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        # In bfloat16 a mean would stand still.
        self.weights = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step` steps in."""
        decay = min(self._decay, (1 + step) / (10 + step))
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        lerp(list(self.weights.values()), [parameter.float() for parameter in self._parameters.values()], 1 - decay)

    def in_place_of_the_weights(self) -> AbstractContextManager[None]:
        """Let the model compute with the mean while the context lasts."""
        return put_in_place(self._parameters, self.weights)


@contextmanager
def put_in_place(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters the values of `weights`, by their names, while the context lasts."""
    # Copied, not exchanged: a captured graph reads the weights where they lie.
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _put(parameters, weights)
        yield
    finally:
        _put(parameters, own)


@torch.no_grad()
def _put(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
