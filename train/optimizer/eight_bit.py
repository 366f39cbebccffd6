"""AdamW with 8-bit moments, quantized by torchao (`pip install 'tilewright[optimizers]'`)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..config import OptimizerConfig
from .part import Part, chunks, flatten, foreach_add_, foreach_mul_, gradients, unflatten

BLOCK = 256
# Bounds the temporary memory of a step: dequantized moments, and codes in int64.
_CHUNK_ELEMENTS = 1 << 24


def is_quantizable(parameter: Tensor) -> bool:
    """Return whether the moments of a parameter are stored in 8 bits. As in torchao, small or odd sizes stay float32."""
    return parameter.numel() >= 4096 and parameter.numel() % BLOCK == 0


class EightBitAdamW(Part):
    """8-bit AdamW (Dettmers et al. 2022): a float32 scale per block of 256 elements, and a dynamic 8-bit code per element.

    The state holds `exp_avg_codes` and `exp_avg_sq_codes` (uint8, in the shape of the parameter), and `exp_avg_scales` and
    `exp_avg_sq_scales` (float32, one per block).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, weight_decay: float) -> None:
        """Construct the rule for parameters for which `is_quantizable` is true."""
        super().__init__(named, lr)
        try:
            from torchao.optim import quant_utils  # slow to import
        except ImportError as error:
            raise UserError("optimizer.states is 8bit: it needs torchao; pip install 'tilewright[optimizers]'") from error
        if any(hasattr(parameter, "to_local") for parameter in self.parameters):
            raise UserError("optimizer.states is 8bit: it does not support sharded weights; choose float32, or parallel ddp")
        self._config, self._weight_decay, self._coder = config, weight_decay, quant_utils
        self._step = torch.zeros_like(lr)
        self._maps = [lr.new_tensor(quant_utils.create_dynamic_map(signed=signed)) for signed in (True, False)]
        # A span of parameters, then the codes and the scales of both moments.
        self._chunks: list[tuple[slice, list[Tensor], list[Tensor]]] = []

    def allocate(self) -> None:
        """Allocate the initial state."""
        kinds = ("exp_avg", "exp_avg_sq")
        self.state = {f"{kind}_{what}": [] for kind in kinds for what in ("codes", "scales")}
        for span in chunks([weight.numel() for weight in self.weights], _CHUNK_ELEMENTS):
            weights = self.weights[span]
            count = sum(weight.numel() for weight in weights)
            coded = [self._encoded(self.lr.new_zeros(count), values) for values in self._maps]
            codes, scales = ([each[i] for each in coded] for i in range(2))
            self._chunks.append((span, codes, scales))
            for kind, code, scale in zip(kinds, codes, scales, strict=True):
                self.state[f"{kind}_codes"] += unflatten(code, weights)
                self.state[f"{kind}_scales"] += scale.split([weight.numel() // BLOCK for weight in weights])
        self.state["step"] = [self._step] * len(self.weights)

    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        self._step += ~skip
        rate = torch.where(skip, 0.0, self.lr)
        corrections = [1 - beta**self._step for beta in self._config.betas]
        for span, codes, scales in self._chunks:
            weights = self.weights[span]
            # The gradient of a skipped step may be NaN.
            gradient = torch.where(skip, 0.0, flatten(gradients(self.parameters[span])))
            moments = []
            for i, value in enumerate((gradient, gradient.square())):
                moment = self._coder.dequant_with_qmap(codes[i], self._maps[i], scales[i])
                moment = moment.lerp_(value, 1 - self._config.betas[i])
                for old, new in zip((codes[i], scales[i]), self._encoded(moment, self._maps[i]), strict=True):
                    old.copy_(torch.where(skip, old, new))
                moments.append(moment / corrections[i])
            update = moments[0] / (moments[1].sqrt() + self._config.eps)
            foreach_mul_(weights, 1 - rate * self._weight_decay)
            foreach_add_(weights, unflatten(update * -rate, weights))

    def _encoded(self, moment: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        scaled, scale = self._coder.scale_tensor(moment, BLOCK)
        return self._coder.quantize_8bit_with_qmap(scaled, values), scale
