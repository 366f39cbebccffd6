"""AdamW on float32 weights with PyTorch's fused kernel."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from .part import Part, gradients


class AdamW(Part):
    """AdamW (Loshchilov & Hutter 2019). Calls the kernel of `torch.optim.AdamW` without that class's Python loop."""

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, weight_decay: float) -> None:
        super().__init__(named, lr)
        self._config, self._weight_decay = config, weight_decay
        self._steps = lr.new_zeros(len(self.weights))

    def allocate(self) -> None:
        """Allocate the initial state."""
        self.state = {
            "step": list(self._steps.unbind()),
            "exp_avg": [torch.zeros_like(weight) for weight in self.weights],
            "exp_avg_sq": [torch.zeros_like(weight) for weight in self.weights],
        }

    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        # The kernel reads the flag of a loss scaler on the device.
        found_inf = skip.float()
        self._steps += 1 - found_inf
        beta1, beta2 = self._config.betas
        state = self.state
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            self.weights, gradients(self.parameters), state["exp_avg"], state["exp_avg_sq"], [], state["step"], lr=self.lr,
            beta1=beta1, beta2=beta2, weight_decay=self._weight_decay, eps=self._config.eps, amsgrad=False, maximize=False,
            grad_scale=None, found_inf=found_inf,
        )  # fmt: skip
