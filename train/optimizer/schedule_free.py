"""Schedule-free AdamW: gradients are of weights between the steps' own and their mean, which needs no decay of the rate."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..ema import put_in_place
from .part import Part, chunks, foreach_add_, foreach_mul_, gradients, laid_out, like, side_by_side


class ScheduleFree(Part):
    """AdamW of Defazio et al. 2024 (algorithm 1 and section 4.5), as their library `schedulefree` has it.

    The parameters are y, of which the gradients are; `z` takes the steps; the mean x = y + (1 - 1 / beta1) (z - y) is what
    validates and is exported. Steps count in the mean by the square of the largest learning rate so far.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, weight_decay: float) -> None:
        super().__init__(named, lr)
        self._config, self._weight_decay = config, weight_decay
        self._step, self._rate_sum, self._largest_rate = (torch.zeros_like(lr) for _ in range(3))
        # Of some parameters each, with z and the second moment.
        self._chunks: list[tuple[slice, Tensor, Tensor]] = []

    def allocate(self) -> None:
        """Make the state as it is before the first step."""
        steps: list[Tensor] = []
        squares: list[Tensor] = []
        for some in chunks([weight.numel() for weight in self.weights]):
            weights = self.weights[some]
            z = side_by_side(weights)
            square = torch.zeros_like(z)
            self._chunks.append((some, z, square))
            steps += laid_out(z, weights)
            squares += laid_out(square, weights)
        scalars = {"step": self._step, "rate_sum": self._rate_sum, "largest_rate": self._largest_rate}
        count = len(self.weights)
        self.state = {"z": steps, "exp_avg_sq": squares, **{kind: [scalar] * count for kind, scalar in scalars.items()}}

    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        beta1, beta2 = self._config.betas
        self._step += ~skip
        rate = torch.where(skip, 0.0, self.lr)
        torch.maximum(self._largest_rate, rate, out=self._largest_rate)
        share = torch.where(skip, 0.0, self._largest_rate.square())
        self._rate_sum += share
        # A rate of 0 so far leaves the mean where it is.
        share = torch.where(share > 0, share / self._rate_sum, 0.0)
        correction = 1 - beta2**self._step
        for some, z, square in self._chunks:
            weights = self.weights[some]
            gradient = side_by_side(gradients(self.parameters[some]))
            # Skipped, it may be made of NaN.
            gradient = torch.where(skip, 0.0, gradient)
            square.lerp_(gradient.square(), torch.where(skip, 0.0, 1 - beta2))
            update = gradient / ((square / correction).sqrt() + self._config.eps)
            if self._weight_decay:
                update += self._weight_decay * side_by_side(weights)
            y_moves = laid_out(share * z + rate * (beta1 * (1 - share) - 1) * update, weights)
            foreach_mul_(weights, 1 - share)
            foreach_add_(weights, y_moves)
            z -= rate * update

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the mean of each parameter's steps by its name, as a new tensor."""
        beta1, _ = self._config.betas
        steps = self.state.get("z", self.weights)
        for name, parameter, y, z in zip(self.names, self.parameters, self.weights, steps, strict=True):
            yield name, like(parameter, y.lerp(z, 1 - 1 / beta1))


class ScheduleFreeMean:
    """The means of the weights that `ScheduleFree` steps, in the place of a `WeightMean`."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = [part for part in parts if isinstance(part, ScheduleFree)]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The means by parameter, computed now."""
        return {name: mean for part in self._parts for name, mean in part.means()}

    def update(self, step: int) -> None:
        """Do nothing: each step of the optimizer is in the mean."""

    def in_place_of_the_weights(self) -> AbstractContextManager[None]:
        """Let the model compute with the means while the context lasts."""
        return put_in_place(
            {n: p for part in self._parts for n, p in zip(part.names, part.parameters, strict=True)}, self.weights
        )
