"""Mixture of experts: a router sends each token through a few of many feed-forward layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import grouped_linear
from .layers import Linear, draw_weight


class GroupedLinear(nn.Module):
    """A `Linear` layer for each group of rows. Each part of a group's matrix is initialized as a `Linear` layer of its own."""

    def __init__(self, num_groups: int, in_features: int, parts: Sequence[int]) -> None:
        super().__init__()
        self.in_features, self.parts = in_features, tuple(parts)
        self.weight = nn.Parameter(torch.empty(num_groups, sum(parts), in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight."""
        for matrix in self.weight.detach():
            for part in matrix.split(self.parts):
                draw_weight(part, self.in_features, part.shape[0])

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Apply the layer, (N, d_in) -> (N, d_out). Group e is the rows ends[e - 1] to ends[e] (`kernels.grouped_linear`)."""
        return grouped_linear(x, self.weight.to(x.dtype), ends)


class Routes(NamedTuple):
    """Permutation of the N k token copies to rows sorted by expert. Token i has the copies i k to i k + k - 1."""

    order: Tensor
    """(N k) int64: copy of each row."""
    rows: Tensor
    """(N k) int64: row of each copy, the inverse of `order`."""
    ends: Tensor
    """(E) int32: end of the rows of each expert."""


def sort_by_expert(experts: Tensor, num_experts: int) -> Routes:
    """Return the routes of tokens to their experts (N, k).

    Experts have no capacity limit, so no token is dropped (Gale et al. 2022). All shapes are static, so there is no
    synchronization with the device.
    """
    ordered, order = experts.flatten().sort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    numbers = torch.arange(num_experts, device=order.device)
    return Routes(order, rows, torch.searchsorted(ordered, numbers, right=True, out_int32=True))


class _Dispatch(torch.autograd.Function):
    """Gather tokens (N, D) into rows (N k, D) sorted by expert. PyTorch's gradient of indexing sums nondeterministically."""

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
    """Sum the rows (N k, D) of each token, weighted by (N, k), into (N, D) in the dtype of the rows."""

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
    """Return E sum_e f_e P_e (Fedus et al. 2021, eq. 4): 1 for balanced experts, up to E if a single expert is used.

    f_e is the share of the choices `experts` (N, k) that select expert e. P_e is the mean of its `probabilities` (N, E).
    """
    numbers = torch.arange(probabilities.shape[1], device=experts.device)
    share = (experts.flatten()[:, None] == numbers).to(probabilities.dtype).mean(dim=0)
    return probabilities.shape[1] * (share * probabilities.mean(dim=0)).sum()


class MixtureOfExperts(nn.Module):
    """Gated feed-forward layers with a router that sends each token to its top k experts: (..., D) -> (..., D).

    The output is the sum of the experts' outputs, weighted by their probabilities among all experts (Shazeer et al. 2017,
    section 2). `normalise` divides the weights by their sum, as in Mixtral (Jiang et al. 2024, section 2.1). `d_ff` is the
    width of one expert.
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
        """Apply the layer to each position; return the result and the `balance_loss` of the router."""
        tokens = x.reshape(-1, x.shape[-1])
        probabilities, weights, experts = self.route(tokens)
        order, rows, ends = sort_by_expert(experts, self.num_experts)
        hidden = self.activation(self.gate_up_proj(_Dispatch.apply(tokens, order, rows), ends))
        y = _Combine.apply(self.down_proj(hidden, ends), weights, order, rows)
        return y.view_as(x), balance_loss(probabilities, experts)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities (N, E) of all experts, and the weights and indices (N, k) of the chosen experts.

        Probabilities and weights are at least float32: half precision would create ties between experts.
        """
        logits = self.router(tokens)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = probabilities.topk(self.experts_per_token)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return probabilities, weights, experts
