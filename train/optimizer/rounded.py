"""AdamW on bfloat16 weights without a float32 copy."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...kernels.adamw import RoundedWeights, adamw_rounded_
from ..config import OptimizerConfig
from .part import Part, chunks, flatten, gradients, shard_offset, unflatten


class RoundedAdamW(Part):
    """AdamW with stochastically rounded updates (see `kernels.adamw`) and float32 moments.

    `first_stream` is the index of the first parameter among all parameters of the model.
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
        # A batch of parameters, their weights with the kernel's table, and their first and second moments.
        self._chunks: list[tuple[list[nn.Parameter], RoundedWeights, Tensor, Tensor, Tensor]] = []
        self._seed, self._first_stream = seed, first_stream

    def allocate(self) -> None:
        """Allocate the initial state."""
        moments: list[list[Tensor]] = [[], []]
        for span in chunks([weight.numel() for weight in self.weights]):
            weights, parameters = self.weights[span], self.parameters[span]
            streams = range(self._first_stream + span.start, self._first_stream + span.stop)
            rounded = RoundedWeights(weights, [shard_offset(p) for p in parameters], streams, self._seed)
            mean, square = (self.lr.new_zeros(sum(weight.numel() for weight in weights)) for _ in range(2))
            for values, flat in zip(moments, (mean, square), strict=True):
                values += unflatten(flat, weights)
            self._chunks.append((parameters, rounded, rounded.table(), mean, square))
        self.state = {"step": [self._step] * len(self.weights), "exp_avg": moments[0], "exp_avg_sq": moments[1]}

    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        self._step += ~skip
        for parameters, rounded, table, mean, square in self._chunks:
            adamw_rounded_(
                rounded, table, flatten(gradients(parameters)), mean, square, self.lr, self._step, skip,
                betas=self._config.betas, eps=self._config.eps, weight_decay=self._weight_decay,
            )  # fmt: skip
