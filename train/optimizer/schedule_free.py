"""Schedule-free AdamW, which averages its iterates instead of decaying the learning rate."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..ema import put_in_place
from .part import Part, chunks, flatten, foreach_add_, foreach_mul_, gradients, like, unflatten


class ScheduleFree(Part):
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1 and section 4.5), equal to their library `schedulefree`.

    The parameters hold y, at which gradients are computed. `z` holds the base iterate. Validation and export use the mean
    x = y + (1 - 1 / beta1) (z - y), which weights each step by the square of the largest learning rate so far.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, weight_decay: float) -> None:
        super().__init__(named, lr)
        self._config, self._weight_decay = config, weight_decay
        self._step, self._rate_sum, self._largest_rate = (torch.zeros_like(lr) for _ in range(3))
        # A span of parameters, its z and its second moment.
        self._chunks: list[tuple[slice, Tensor, Tensor]] = []

    def allocate(self) -> None:
        """Allocate the initial state."""
        iterates: list[Tensor] = []
        squares: list[Tensor] = []
        for span in chunks([weight.numel() for weight in self.weights]):
            weights = self.weights[span]
            z = flatten(weights)
            square = torch.zeros_like(z)
            self._chunks.append((span, z, square))
            iterates += unflatten(z, weights)
            squares += unflatten(square, weights)
        scalars = {"step": self._step, "rate_sum": self._rate_sum, "largest_rate": self._largest_rate}
        count = len(self.weights)
        self.state = {"z": iterates, "exp_avg_sq": squares, **{kind: [scalar] * count for kind, scalar in scalars.items()}}

    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        beta1, beta2 = self._config.betas
        self._step += ~skip
        rate = torch.where(skip, 0.0, self.lr)
        torch.maximum(self._largest_rate, rate, out=self._largest_rate)
        share = torch.where(skip, 0.0, self._largest_rate.square())
        self._rate_sum += share
        # While all learning rates are 0, the mean does not move.
        share = torch.where(share > 0, share / self._rate_sum, 0.0)
        correction = 1 - beta2**self._step
        for span, z, square in self._chunks:
            weights = self.weights[span]
            gradient = flatten(gradients(self.parameters[span]))
            # The gradient of a skipped step may be NaN.
            gradient = torch.where(skip, 0.0, gradient)
            square.lerp_(gradient.square(), torch.where(skip, 0.0, 1 - beta2))
            update = gradient / ((square / correction).sqrt() + self._config.eps)
            if self._weight_decay:
                update += self._weight_decay * flatten(weights)
            y_moves = unflatten(share * z + rate * (beta1 * (1 - share) - 1) * update, weights)
            foreach_mul_(weights, 1 - share)
            foreach_add_(weights, y_moves)
            z -= rate * update

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter and the mean of its iterates, as a new tensor."""
        beta1, _ = self._config.betas
        iterates = self.state.get("z", self.weights)
        for name, parameter, y, z in zip(self.names, self.parameters, self.weights, iterates, strict=True):
            yield name, like(parameter, y.lerp(z, 1 - 1 / beta1))


class ScheduleFreeMean:
    """The means of the weights that `ScheduleFree` updates. Replaces an `EMA`."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = [part for part in parts if isinstance(part, ScheduleFree)]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The means, keyed by parameter name. Computed at each access."""
        return {name: mean for part in self._parts for name, mean in part.means()}

    def update(self, step: int) -> None:
        """Do nothing: the optimizer updates the mean itself."""

    def in_place_of_the_weights(self) -> AbstractContextManager[None]:
        """Replace the weights by the means within the context."""
        return put_in_place(
            {n: p for part in self._parts for n, p in zip(part.names, part.parameters, strict=True)}, self.weights
        )
