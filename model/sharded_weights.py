"""Weights that are DTensors, as tensor parallelism makes them."""

from torch import Tensor, nn


def local(weight: Tensor) -> Tensor:
    """Return a weight as it is, or, of a DTensor, what this process has of it.

    Where all processes of a mesh have the same, each computes with its own positions: the gradient is the sum of theirs.
    """
    # Spares the import, which is slow.
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])
