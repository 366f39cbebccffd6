"""What the rules of update share: the parameters that a rule steps, its state, and how both lie in this process."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# One launch for a list of tensors.
foreach_add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

# Of one batch of parameters, whose gradients a rule lays side by side: bounds what the rule holds for a moment.
CHUNK_ELEMENTS = 1 << 26


class Part:
    """Named parameters under one rule of update; of a DTensor a process steps its own shard.

    `state` holds, by its kind, a tensor for each parameter; it is empty until `allocate`. `lr` is read on the device.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor) -> None:
        self.names, self.parameters = list(named), list(named.values())
        self.weights = [local(parameter.detach()) for parameter in self.parameters]
        self.lr = lr
        self.state: dict[str, list[Tensor]] = {}

    def allocate(self) -> None:
        """Make the state as it is before the first step."""
        raise NotImplementedError

    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by kind and parameter; what is of a shard is a DTensor."""
        return {
            f"{kind}.{name}": like(parameter, value)
            for kind, values in self.state.items()
            for name, parameter, value in zip(self.names, self.parameters, values, strict=True)
        }


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients, or this process's shards of them."""
    found = []
    for parameter in parameters:
        assert parameter.grad is not None
        found.append(local(parameter.grad))
    return found


def local(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or this process's shard of a DTensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def first_element(parameter: Any) -> int:
    """Return the place of this process's shard along dimension 0 in the whole parameter, flattened; 0 of no DTensor."""
    if not hasattr(parameter, "to_local"):
        return 0
    (chunk,) = parameter.__create_chunk_list__()
    return chunk.offsets[0] * math.prod(parameter.shape[1:])


def like(parameter: Any, value: Tensor) -> Tensor:
    """Return what belongs to a parameter's shard as a DTensor of the same placement; of a whole parameter as it is."""
    # A count of steps is the same in all processes.
    if not hasattr(parameter, "to_local") or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor  # slow to import

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def chunks(sizes: Sequence[int], most: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Cut a sequence of tensors, given by their sizes, into runs of at most so many elements, or of one tensor."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > most:
            yield slice(first, i)
            first, total = i, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def laid_out(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a vector as views with the shapes of tensors that lie in it side by side."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of all tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
