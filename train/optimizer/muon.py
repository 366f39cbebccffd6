"""Muon (Jordan et al. 2024): momentum with orthogonalized updates, batched over matrices, on whole or sharded parameters."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import UserError
from ..config import OptimizerConfig
from .part import Part, chunks, flatten, foreach_add_, foreach_copy_, foreach_mul_, gradients, shard_offset, unflatten

MOMENTUM, ITERATIONS = 0.95, 5
# The coefficients of the quintic Newton-Schulz iteration, and the lower bound of the norm.
COEFFICIENTS, EPS = (3.4445, -4.775, 2.0315), 1e-7


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the orthogonal factors of matrices (N, rows, columns) in bfloat16, by Newton-Schulz iterations.

    Runs the iteration of `torch.optim.Muon`, batched over the matrices.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(Part):
    """Nesterov momentum, orthogonalized updates with the usual RMS of AdamW, and decoupled weight decay.

    A parameter (..., rows, columns) is a batch of matrices. `parts` lists the rows of each linear map in such a matrix; a
    parameter without an entry holds one map. Updates are scaled so that Muon and AdamW share a learning rate and weight decay
    (Liu et al. 2025, equation 4). With parameters sharded along dimension 0, each process gathers a subset of the matrices,
    orthogonalizes their updates and scatters the shards back. A step never synchronizes the host with the device.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, parts: Mapping[Tensor, tuple[int, ...]]
    ) -> None:
        super().__init__(named, lr)
        self._weight_decay = config.weight_decay
        slices = chunks([parameter.numel() for parameter in self.parameters])
        self._chunks = [_Chunk(self.parameters[each], self.weights[each], parts) for each in slices]

    def allocate(self) -> None:
        """Allocate the initial state."""
        momenta: dict[Tensor, Tensor] = {}
        for chunk in self._chunks:
            chunk.momentum = flatten([torch.zeros_like(weight) for weight in chunk.weights])
            momenta |= zip(chunk.parameters, unflatten(chunk.momentum, chunk.weights), strict=True)
        self.state = {"momentum_buffer": [momenta[parameter] for parameter in self.parameters]}

    def step(self, skip: Tensor) -> None:
        """Take a step. Where `skip` (bool, on the device) is true, leave weights and state unchanged."""
        rate = torch.where(skip, 0.0, self.lr)
        for chunk in self._chunks:
            chunk.step(skip, rate, self._weight_decay)


class _Chunk:
    """A batch of parameters with their momenta in one flat buffer."""

    momentum: Tensor

    def __init__(self, parameters: list[nn.Parameter], weights: list[Tensor], parts: Mapping[Tensor, tuple[int, ...]]) -> None:
        self._shards = _Shards.of(parameters)
        order = self._shards.order if self._shards else range(len(parameters))
        self.parameters, self.weights = [parameters[i] for i in order], [weights[i] for i in order]
        owned = self._shards.owned if self._shards else self.parameters
        # The shapes of the matrices that this process orthogonalizes.
        self._matrices = [shape for parameter in owned for shape in _matrices(parameter, parts)]
        # Each piece holds the local rows of one matrix. Its scale multiplies the orthogonal update.
        self._pieces: list[Tensor] = []
        self._scales: list[float] = []
        for i, weight in enumerate(self.weights):
            rows = weight.view(-1, weight.shape[-1])
            start = shard_offset(self.parameters[i]) // weight.shape[-1]
            ends = list(accumulate(shape[0] for shape in _matrices(self.parameters[i], parts)))
            for first, end in pairwise([0, *ends]):
                piece = rows[max(first - start, 0) : max(end - start, 0)]
                if len(piece):
                    self._pieces.append(piece)
                    self._scales.append(0.2 * math.sqrt(max(end - first, weight.shape[-1])))

    def step(self, skip: Tensor, rate: Tensor, weight_decay: float) -> None:
        gradient = flatten(gradients(self.parameters))
        momentum = torch.lerp(self.momentum, gradient, 1 - MOMENTUM)
        update = torch.lerp(gradient, momentum, MOMENTUM).bfloat16()
        self.momentum.copy_(torch.where(skip, self.momentum, momentum))
        if self._shards is None:
            update = self._orthogonalize(update)
        else:
            update = self._shards.scatter(self._orthogonalize(self._shards.gather(update)))
        # The update of a skipped step may be NaN.
        updates = unflatten(torch.where(skip, 0.0, update.float() * -rate), self._pieces)
        foreach_mul_(updates, self._scales)
        foreach_mul_(self._pieces, 1 - rate * weight_decay)
        foreach_add_(self._pieces, updates)

    def _orthogonalize(self, update: Tensor) -> Tensor:
        """Orthogonalize the matrices in the flat vector `update`, in one batch per shape."""
        result = torch.empty_like(update)
        by_shape: defaultdict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        sizes = [rows * columns for rows, columns in self._matrices]
        for shape, matrix, target in zip(self._matrices, update.split(sizes), result.split(sizes), strict=True):
            matrices, targets = by_shape[shape]
            matrices.append(matrix.view(shape))
            targets.append(target.view(shape))
        for matrices, targets in by_shape.values():
            foreach_copy_(targets, list(orthogonal(torch.stack(matrices)).contiguous().unbind()))
        return result


def _matrices(parameter: Tensor, parts: Mapping[Tensor, tuple[int, ...]]) -> list[tuple[int, int]]:
    """Return the shapes of the matrices in a parameter (..., rows, columns), in order."""
    *leading, rows, columns = parameter.shape
    return [(part, columns) for _ in range(math.prod(leading)) for part in parts.get(parameter, (rows,))]


class _Shards:
    """Gathers the shards of a batch of parameters, each parameter on one owner process, and scatters the results back.

    The flat vectors hold the parameters in `order`, sorted by owner.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        # Assign the largest parameter first, each to the process with the least work.
        load, owner = [0.0] * self._size, [0] * len(parameters)
        for i in sorted(range(len(parameters)), key=lambda i: -_work(parameters[i])):
            owner[i] = load.index(min(load))
            load[owner[i]] += _work(parameters[i])
        self.order = sorted(range(len(parameters)), key=lambda i: owner[i])
        self.owned = [parameters[i] for i in self.order if owner[i] == self._rank]
        # Elements to send to each process, and elements to receive of each owned parameter from each process.
        self._sent = [0] * self._size
        for parameter, rank in zip(parameters, owner, strict=True):
            self._sent[rank] += self._sizes(parameter)[self._rank]
        self._received = [self._sizes(parameter) for parameter in self.owned]

    @classmethod
    def of(cls, parameters: list[nn.Parameter]) -> "_Shards | None":
        """Return the shards of DTensors, or None for whole parameters."""
        if not hasattr(parameters[0], "placements"):
            return None
        mesh, placements = parameters[0].device_mesh, parameters[0].placements  # pyright: ignore[reportAttributeAccessIssue]
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise UserError("optimizer.name is muon: it needs weights that are whole or sharded by fsdp; choose parallel fsdp")
        return cls(parameters, mesh.get_group())

    def gather(self, shards: Tensor) -> Tensor:
        """Return the owned parameters, whole, in one vector, from the local `shards` of all parameters in one vector."""
        received = self._exchange(shards, self._sent, [sum(sizes) for sizes in zip(*self._received, strict=True)])
        by_process = received.split([*chain.from_iterable(zip(*self._received, strict=True))])
        count = len(self.owned)
        return torch.cat([by_process[rank * count + i] for i in range(count) for rank in range(self._size)] or [received])

    def scatter(self, whole: Tensor) -> Tensor:
        """Invert `gather`: return the local shards of all parameters from the owned ones."""
        by_parameter = whole.split([*chain.from_iterable(self._received)])
        count = range(len(self.owned))
        sent = torch.cat([by_parameter[i * self._size + rank] for rank in range(self._size) for i in count] or [whole])
        return self._exchange(sent, [sum(sizes) for sizes in zip(*self._received, strict=True)], self._sent)

    def _sizes(self, parameter: Tensor) -> list[int]:
        """Return the number of elements in the shard of each process, split as `torch.chunk` does."""
        length = parameter.shape[0]
        ends = [min(rank * -(-length // self._size), length) for rank in range(self._size + 1)]
        return [(end - start) * (parameter.numel() // length) for start, end in pairwise(ends)]

    def _exchange(self, sent: Tensor, sizes: Sequence[int], sizes_back: Sequence[int]) -> Tensor:
        # The sizes are empty in a process that owns no parameter.
        sizes, sizes_back = (list(each) or [0] * self._size for each in (sizes, sizes_back))
        received = sent.new_empty(sum(sizes_back))
        # As bytes, because gloo does not support bfloat16.
        width = sent.itemsize
        dist.all_to_all_single(
            received.view(torch.uint8), sent.contiguous().view(torch.uint8), [width * n for n in sizes_back],
            [width * n for n in sizes], self._group,
        )  # fmt: skip
        return received


def _work(parameter: Tensor) -> float:
    # Proportional to the FLOPs of the product of a matrix and its transpose.
    return parameter.numel() * min(parameter.shape[-2:])
