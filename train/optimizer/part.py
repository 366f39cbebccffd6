"""The base class of the update rules, and helpers for flat buffers and shards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# One kernel launch for a list of tensors.
foreach_add_ = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

# Bounds the flat buffer of gradients that a rule allocates for a batch of parameters.
CHUNK_ELEMENTS = 1 << 26


class Part:
    """Named parameters with one update rule. A process updates its own shard of a DTensor.

    `state` maps a kind, such as "exp_avg", to one tensor per parameter; `allocate` fills it. `lr` is a tensor on the device.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lr: Tensor) -> None:
        self.names, self.parameters = list(named), list(named.values())
        self.weights = [local(parameter.detach()) for parameter in self.parameters]
        self.lr = lr
        self.state: dict[str, list[Tensor]] = {}

    def allocate(self) -> None:
        """Allocate the initial state."""
        raise NotImplementedError

    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, keyed by kind and parameter name. The state of a sharded parameter is a DTensor."""
        return {
            f"{kind}.{name}": like(parameter, value)
            for kind, values in self.state.items()
            for name, parameter, value in zip(self.names, self.parameters, values, strict=True)
        }


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of each parameter, or this process's shard of it."""
    found = []
    for parameter in parameters:
        assert parameter.grad is not None
        found.append(local(parameter.grad))
    return found


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, or any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def shard_offset(parameter: Any) -> int:
    """Return the offset of this process's shard (dimension 0) in the flattened parameter, in elements; 0 if not a DTensor."""
    if not hasattr(parameter, "to_local"):
        return 0
    (chunk,) = parameter.__create_chunk_list__()
    return chunk.offsets[0] * math.prod(parameter.shape[1:])


def like(parameter: Any, value: Tensor) -> Tensor:
    """Return the state `value` of a sharded parameter as a DTensor with its placement, or of any other parameter as it is."""
    # A scalar, such as the step, is equal in all processes.
    if not hasattr(parameter, "to_local") or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor  # slow to import

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def chunks(sizes: Sequence[int], most: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Split tensors of the given sizes into consecutive batches of at most `most` elements, or of one larger tensor."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > most:
            yield slice(first, i)
            first, total = i, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a vector with the shapes of the tensors in `like`. Inverts `flatten`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate the elements of all tensors to one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
