"""Exponential moving average of the weights. While the learning rate is high, it validates better than the weights."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a model's weights (Polyak & Juditsky 1992; Morales-Brotons et al. 2024).

    Step t uses min(decay, (1 + t) / (10 + t)), so that the initial weights fade quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        # float32: in bfloat16, updates this small would round to zero.
        self.weights = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after `step` steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        lerp(list(self.weights.values()), [parameter.float() for parameter in self._parameters.values()], 1 - decay)

    def in_place_of_the_weights(self) -> AbstractContextManager[None]:
        """Use the average in place of the model's weights inside the context."""
        return put_in_place(self._parameters, self.weights)


@contextmanager
def put_in_place(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the parameters the values of `weights`, by name, inside the context; restore them afterwards."""
    # Copy the values instead of swapping tensors: a captured CUDA graph reads fixed addresses.
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
