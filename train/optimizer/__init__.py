"""The optimizer of a run: AdamW in one of its forms, or Muon for the matrices of the blocks and AdamW for the rest."""

import torch
from torch import Tensor, nn

from ...model.experts import GroupedLinear
from ...model.layers import JoinedLinear
from ..config import OptimizerConfig
from .adamw import AdamW
from .eight_bit import EightBitAdamW, can_be_coded
from .muon import Muon
from .part import Part
from .rounded import RoundedAdamW
from .schedule_free import ScheduleFree, ScheduleFreeMean


class Optimizer:
    """The rules of update of a model's parameters, as one: decays matrices and leaves norms alone.

    Muon orthogonalises the update of each linear map's own matrix; a `JoinedLinear` or a `GroupedLinear` holds several. The
    host never waits for the device. The parameters must not move any more.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, seed: int = 0) -> None:
        """Step float32 weights, or bfloat16 ones; `seed` is that of the rounding of these."""
        named = dict(model.named_parameters())
        self._parameters = list(named.values())
        # A tensor, so that a graph that holds the step, compiled or captured, reads each step's value.
        self._lr = torch.tensor(config.lr, device=self._parameters[0].device)
        by_muon = {n for n, p in named.items() if config.name == "muon" and p.dim() >= 2 and n.startswith("layers.")}
        rest = {n: p for n, p in named.items() if n not in by_muon}
        matrices, vectors = ({n: p for n, p in rest.items() if (p.dim() >= 2) == decays} for decays in (True, False))
        self._parts: list[Part] = []
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            coded = {n: p for n, p in group.items() if config.states == "8bit" and can_be_coded(p)}
            if coded:
                self._parts.append(EightBitAdamW(coded, self._lr, config, decay))
            others = {n: p for n, p in group.items() if n not in coded}
            if self._parameters[0].dtype == torch.bfloat16:
                first_stream = 0 if group is matrices else len(matrices)
                self._parts.append(RoundedAdamW(others, self._lr, config, decay, seed, first_stream))
            elif others:
                rule = ScheduleFree if config.name == "schedule_free" else AdamW
                self._parts.append(rule(others, self._lr, config, decay))
        if by_muon:
            layers = (layer for layer in model.modules() if isinstance(layer, JoinedLinear | GroupedLinear))
            rows = {layer.weight: layer.parts for layer in layers}
            self._parts.append(Muon({n: named[n] for n in named if n in by_muon}, self._lr, config, rows))
        self.mean = ScheduleFreeMean(self._parts) if config.name == "schedule_free" else None

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` for the next step of every parameter."""
        self._lr.fill_(lr)

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        if not self._parts[0].state:
            self.allocate()
        for part in self._parts:
            part.step(skip)

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as tensors by kind and parameter, such as `exp_avg.ln_final.weight`."""
        return {name: tensor for part in self._parts for name, tensor in part.tensors().items()}

    def allocate(self) -> None:
        """Make the whole state, as it is before the first step; a checkpoint of any later one can be read into it."""
        for part in self._parts:
            part.allocate()
