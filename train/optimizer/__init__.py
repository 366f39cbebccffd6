"""The optimizer of a run: a variant of AdamW, or Muon for the matrices of the blocks and AdamW for the other parameters."""

import torch
from torch import Tensor, nn

from ...model.experts import GroupedLinear
from ...model.layers import JoinedLinear
from ..config import OptimizerConfig
from .adamw import AdamW
from .eight_bit import EightBitAdamW, is_quantizable
from .muon import Muon
from .part import Part
from .rounded import RoundedAdamW
from .schedule_free import ScheduleFree, ScheduleFreeMean


class Optimizer:
    """Updates all parameters of a model. Weight decay applies to matrices, not to norms.

    Muon orthogonalizes the update of each linear map separately; a `JoinedLinear` or a `GroupedLinear` holds several maps. A
    step never synchronizes the host with the device. Move the model to its device before you construct the optimizer.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, seed: int = 0) -> None:
        """Construct the optimizer for float32 or bfloat16 weights. `seed` seeds the stochastic rounding of bfloat16 weights."""
        named = dict(model.named_parameters())
        self._parameters = list(named.values())
        # A tensor, so that a compiled or captured graph reads the current value at each step.
        self._lr = torch.tensor(config.lr, device=self._parameters[0].device)
        muon_names = {n for n, p in named.items() if config.name == "muon" and p.dim() >= 2 and n.startswith("layers.")}
        rest = {n: p for n, p in named.items() if n not in muon_names}
        matrices, vectors = ({n: p for n, p in rest.items() if (p.dim() >= 2) == decays} for decays in (True, False))
        self._parts: list[Part] = []
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            coded = {n: p for n, p in group.items() if config.states == "8bit" and is_quantizable(p)}
            if coded:
                self._parts.append(EightBitAdamW(coded, self._lr, config, decay))
            others = {n: p for n, p in group.items() if n not in coded}
            if self._parameters[0].dtype == torch.bfloat16:
                first_stream = 0 if group is matrices else len(matrices)
                self._parts.append(RoundedAdamW(others, self._lr, config, decay, seed, first_stream))
            elif others:
                rule = ScheduleFree if config.name == "schedule_free" else AdamW
                self._parts.append(rule(others, self._lr, config, decay))
        if muon_names:
            layers = (layer for layer in model.modules() if isinstance(layer, JoinedLinear | GroupedLinear))
            rows = {layer.weight: layer.parts for layer in layers}
            self._parts.append(Muon({n: named[n] for n in named if n in muon_names}, self._lr, config, rows))
        self.mean = ScheduleFreeMean(self._parts) if config.name == "schedule_free" else None

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        self._lr.fill_(lr)

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        if not self._parts[0].state:
            self.allocate()
        for part in self._parts:
            part.step(skip)

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state, keyed by kind and parameter name, such as `exp_avg.ln_final.weight`."""
        return {name: tensor for part in self._parts for name, tensor in part.tensors().items()}

    def allocate(self) -> None:
        """Allocate the initial state. A checkpoint of any step can be loaded into it."""
        for part in self._parts:
            part.allocate()
