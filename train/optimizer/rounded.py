"""AdamW on bfloat16 weights, of which there is no float32 copy."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...kernels.adamw import RoundedWeights, adamw_rounded_
from ..config import OptimizerConfig
from .part import Part, chunks, first_element, gradients, laid_out, side_by_side


class RoundedAdamW(Part):
    """AdamW whose updates are rounded stochastically; see `kernels.adamw`. Moments are float32.

    `first_stream` numbers the first parameter among all those of the model.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        lr: Tensor,
        config: OptimizerConfig,
        weight_decay: float,
        seed: int,
        first_stream: int,
    ) -> None:
        super().__init__(named, lr)
        self._config, self._weight_decay = config, weight_decay
        self._step = torch.zeros_like(lr)
        # Of some parameters each, with their moments.
        self._chunks: list[tuple[list[nn.Parameter], RoundedWeights, Tensor, Tensor, Tensor]] = []
        self._seed, self._first_stream = seed, first_stream

    def allocate(self) -> None:
        """Make the state as it is before the first step."""
        moments: list[list[Tensor]] = [[], []]
        for some in chunks([weight.numel() for weight in self.weights]):
            weights, parameters = self.weights[some], self.parameters[some]
            streams = range(self._first_stream + some.start, self._first_stream + some.stop)
            rounded = RoundedWeights(weights, [first_element(p) for p in parameters], streams, self._seed)
            mean, square = (self.lr.new_zeros(sum(weight.numel() for weight in weights)) for _ in range(2))
            for all_of_them, flat in zip(moments, (mean, square), strict=True):
                all_of_them += laid_out(flat, weights)
            self._chunks.append((parameters, rounded, rounded.table(), mean, square))
        self.state = {"step": [self._step] * len(self.weights), "exp_avg": moments[0], "exp_avg_sq": moments[1]}

    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        self._step += ~skip
        for parameters, rounded, table, mean, square in self._chunks:
            adamw_rounded_(
                rounded, table, side_by_side(gradients(parameters)), mean, square, self.lr, self._step, skip,
                betas=self._config.betas, eps=self._config.eps, weight_decay=self._weight_decay,
            )  # fmt: skip
