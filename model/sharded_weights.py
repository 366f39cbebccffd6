"""Weights as DTensors, for tensor parallelism."""

from torch import Tensor, nn


def local(weight: Tensor) -> Tensor:
    """Return the local shard of a DTensor; return any other weight unchanged.

    Processes with replicated weights compute different positions, so the gradient is the sum over these processes.
    """
    # Avoid the slow import.
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])
