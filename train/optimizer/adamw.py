"""AdamW on float32 weights, by PyTorch's fused kernel."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from .part import Part, gradients


class AdamW(Part):
    """Loshchilov & Hutter 2019, with `torch.optim.AdamW`'s own kernel: its class runs Python for each parameter."""

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, weight_decay: float) -> None:
        super().__init__(named, lr)
        self._config, self._weight_decay = config, weight_decay
        self._steps = lr.new_zeros(len(self.weights))

    def allocate(self) -> None:
        """Make the state as it is before the first step."""
        self.state = {
            "step": list(self._steps.unbind()),
            "exp_avg": [torch.zeros_like(weight) for weight in self.weights],
            "exp_avg_sq": [torch.zeros_like(weight) for weight in self.weights],
        }

    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        # What a loss scaler sets: the kernel reads it on the device.
        found_inf = skip.float()
        self._steps += 1 - found_inf
        beta1, beta2 = self._config.betas
        state = self.state
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            self.weights, gradients(self.parameters), state["exp_avg"], state["exp_avg_sq"], [], state["step"], lr=self.lr,
            beta1=beta1, beta2=beta2, weight_decay=self._weight_decay, eps=self._config.eps, amsgrad=False, maximize=False,
            grad_scale=None, found_inf=found_inf,
        )  # fmt: skip
