"""The optimizer of a run: AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..model.experts import GroupedLinear
from ..model.layers import JoinedLinear
from .config import OptimizerConfig


def _adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    # A tensor, so that a graph that holds the step, compiled or captured, reads each step's value. Given only now, as the
    # constructor would wait for the device to know it.
    lr = torch.tensor(config.lr, device=parameters[0].device)
    for group in adamw.param_groups:
        group["lr"] = lr
    return adamw


def _muon(matrices: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Muon:
    # Updates as large as AdamW's usually are (Liu et al. 2025, equation 4), so that both share a learning rate and a decay.
    return torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")


def _matrices(tensor: Tensor, parts: tuple[int, ...]) -> list[Tensor]:
    # (..., D_out, D_in): each matrix, cut into parts of so many rows.
    return [part for matrix in tensor.view(-1, *tensor.shape[-2:]).unbind() for part in matrix.split(parts)]


def _initial_state(part: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


class Optimizer:
    """The optimizers of a model's parameters, as one: decays matrices and leaves norms alone.

    Muon orthogonalises the update of each linear map's own matrix: of a `JoinedLinear` or a `GroupedLinear` it steps on the
    parts, which are views. The parameters must not move any more.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._parameters = list(model.parameters())
        self._names: dict[Tensor, str] = {}
        # Of each parameter that is Muon's, the matrices in it.
        self._matrices: dict[nn.Parameter, list[Tensor]] = {}
        self._parts: dict[Tensor, tuple[int, ...]] = {}
        for layer in model.modules():
            if isinstance(layer, JoinedLinear | GroupedLinear):
                self._parts[layer.weight] = layer.parts
        for name, parameter in model.named_parameters():
            if config.name != "muon" or parameter.dim() < 2 or not name.startswith("layers."):
                self._names[parameter] = name
                continue
            parts = self._parts.setdefault(parameter, (parameter.shape[-2],))
            matrices = self._matrices[parameter] = _matrices(parameter.detach(), parts)
            for i, matrix in enumerate(matrices):
                self._names[matrix] = f"{name}.{i}" if len(matrices) > 1 else name
        self._adamw = _adamw((p for p in self._parameters if p not in self._matrices), config)
        self._muon = _muon(itertools.chain(*self._matrices.values()), config) if self._matrices else None
        self.parts: list[torch.optim.Optimizer] = [self._adamw, *([self._muon] if self._muon else [])]

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` for the next step of every parameter."""
        # All groups share the tensor.
        self._adamw.param_groups[0]["lr"].fill_(lr)
        for group in self._muon.param_groups if self._muon else ():
            group["lr"] = lr

    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        if not self._adamw.state:
            self.allocate()
        # What a loss scaler sets: the fused kernel reads it on the device.
        self._adamw.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
        self._adamw.step()
        # Muon has no such flag, and waits for the device to know it.
        if self._muon is not None and not bool(skip):
            for parameter, matrices in self._matrices.items():
                assert parameter.grad is not None
                for matrix, gradient in zip(matrices, _matrices(parameter.grad, self._parts[parameter]), strict=True):
                    matrix.grad = gradient
            self._muon.step()
            self._muon.zero_grad()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as tensors by kind and parameter, such as `exp_avg.ln_final.weight`.

        Those of the matrices of one weight are numbered, as `momentum_buffer.layers.0.attn.qkv_proj.weight.2`.
        """
        return {
            f"{kind}.{self._names[parameter]}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for kind, value in state.items()
        }

    def allocate(self) -> None:
        """Make the whole state, as it is before the first step; a checkpoint of any later one can be read into it."""
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    part.state[parameter] = _initial_state(part, parameter)
