"""A mixture of experts: a feed-forward layer of many, of which each token passes through a few."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import grouped_linear
from .layers import Linear, draw_weight


class GroupedLinear(nn.Module):
    """A `Linear` layer for each group of rows; each `part` of a group's matrix is drawn as a layer's own would be."""

    def __init__(self, num_groups: int, in_features: int, parts: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.parts = in_features, tuple(parts)
        self.weight = nn.Parameter(torch.empty(num_groups, sum(parts), in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        for matrix in self.weight.detach():
            for part in matrix.split(self.parts):
                draw_weight(part, self.in_features, part.shape[0])

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Multiply (N, d_in) -> (N, d_out); group e is the rows up to ends[e], see `kernels.grouped_linear`."""
        return grouped_linear(x, self.weight.to(x.dtype), ends)


class Routes(NamedTuple):
    """Which expert's rows each token is copied to: token i is i k to i k + k - 1 of N k copies, which are sorted by expert."""

    order: Tensor
    """(N k) int64: the copy that each row holds."""
    rows: Tensor
    """(N k) int64: the row of each copy."""
    ends: Tensor
    """(E) int32: where the rows of each expert end."""


def sort_by_expert(experts: Tensor, num_experts: int) -> Routes:
    """Return where the tokens go, experts (N, k): no expert has a limit, so no token is left out (Gale et al. 2022).

    All shapes are known beforehand, and nothing is read back from the device.
    """
    ordered, order = experts.flatten().sort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(num_experts, device=order.device)
    return Routes(order, rows, torch.searchsorted(ordered, numbers, right=True, out_int32=True))


class _Dispatch(torch.autograd.Function):
    """Tokens (N, D) to the rows (N k, D) of their experts. PyTorch's own gradient of this adds in an order that varies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.copies = len(rows) // len(x)
        return x[order // ctx.copies]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return gradients[0][rows].unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """Rows (N k, D), by the weights (N, k) of the tokens that they are copies of, to sums (N, D) in the dtype of the rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, order, rows)
        return (y[rows].view(*weights.shape, -1) * weights[..., None]).sum(dim=1).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, rows = ctx.saved_tensors
        (gradient,) = gradients
        dy = gradient[order // weights.shape[1]] * weights.flatten()[order, None]
        dweights = (y[rows].view(*weights.shape, -1).to(weights.dtype) * gradient[:, None]).sum(dim=-1)
        return dy.to(y.dtype), dweights, None, None


def balance_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Return E sum_e f_e P_e (Fedus et al. 2021, eq. 4): 1 where all experts are used alike, up to E where one is used alone.

    f is the share of the choices `experts` (N, k) that fall on an expert, P the mean of its `probabilities` (N, E).
    """
    numbers = torch.arange(probabilities.shape[1], device=experts.device)
    share = (experts.flatten()[:, None] == numbers).to(probabilities.dtype).mean(dim=0)
    return probabilities.shape[1] * (share * probabilities.mean(dim=0)).sum()


class MixtureOfExperts(nn.Module):
    """Gated feed-forward layers of which each token passes through the k that its router prefers: (..., D) -> (..., D).

    The outputs are summed by their probabilities among all experts (Shazeer et al. 2017, section 2), which with `normalise` are
    divided by their sum, as in Mixtral (Jiang et al. 2024, section 2.1). `d_ff` is the width of one expert.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        experts_per_token: int,
        activation: Callable[[Tensor], Tensor],
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token, self.normalise = num_experts, experts_per_token, normalise
        self.router = Linear(d_model, num_experts)
        self.gate_up_proj = GroupedLinear(num_experts, d_model, (d_ff, d_ff))
        self.down_proj = GroupedLinear(num_experts, d_ff, (d_model,))
        self.activation = activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the layer to each position; return the result and the `balance_loss` of its router."""
        tokens = x.reshape(-1, x.shape[-1])
        probabilities, weights, experts = self.route(tokens)
        order, rows, ends = sort_by_expert(experts, self.num_experts)
        hidden = self.activation(self.gate_up_proj(_Dispatch.apply(tokens, order, rows), ends))
        y = _Combine.apply(self.down_proj(hidden, ends), weights, order, rows)
        return y.view_as(x), balance_loss(probabilities, experts)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities (N, E) of all experts, and the weights and numbers (N, k) of those that are chosen.

        Probabilities and weights are float32 at least: half precision would make experts that differ equal.
        """
        logits = self.router(tokens)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = probabilities.topk(self.experts_per_token)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return probabilities, weights, experts
