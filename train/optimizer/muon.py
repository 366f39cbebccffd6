"""Muon (Jordan et al. 2024): steps of momentum whose matrices are made orthogonal, several at a time, whole or from shards."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import UserError
from ..config import OptimizerConfig
from .part import Part, chunks, first_element, foreach_add_, foreach_copy_, foreach_mul_, gradients, laid_out, side_by_side

MOMENTUM, ITERATIONS = 0.95, 5
# Of the quintic that a Newton-Schulz iteration applies to the singular values, and the least norm that is divided by.
COEFFICIENTS, EPS = (3.4445, -4.775, 2.0315), 1e-7


def orthogonal(matrices: Tensor) -> Tensor:
    """Return, in bfloat16, the orthogonal factors of matrices (N, rows, columns) by Newton-Schulz iterations.

    As `torch.optim.Muon` has them, but of all matrices at once.
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
    """Momentum (Nesterov's), orthogonal updates as large as AdamW's usually are, decoupled decay; all on the device.

    A parameter (..., rows, columns) holds matrices, each of them cut into `parts` of so many rows. The updates share AdamW's
    learning rate and decay (Liu et al. 2025, equation 4). Of shards along dimension 0, each process gathers the matrices of
    some parameters, makes them orthogonal and hands their shards back.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], lr: Tensor, config: OptimizerConfig, parts: Mapping[Tensor, tuple[int, ...]]
    ) -> None:
        super().__init__(named, lr)
        self._weight_decay = config.weight_decay
        slices = chunks([parameter.numel() for parameter in self.parameters])
        self._chunks = [_Chunk(self.parameters[each], self.weights[each], parts) for each in slices]

    def allocate(self) -> None:
        """Make the state as it is before the first step."""
        momenta: dict[Tensor, Tensor] = {}
        for chunk in self._chunks:
            chunk.momentum = side_by_side([torch.zeros_like(weight) for weight in chunk.weights])
            momenta |= zip(chunk.parameters, laid_out(chunk.momentum, chunk.weights), strict=True)
        self.state = {"momentum_buffer": [momenta[parameter] for parameter in self.parameters]}

    def step(self, skip: Tensor) -> None:
        """Take a step, or leave weights and state as they are where the device finds `skip` true."""
        rate = torch.where(skip, 0.0, self.lr)
        for chunk in self._chunks:
            chunk.step(skip, rate, self._weight_decay)


class _Chunk:
    """Some parameters whose momenta lie side by side."""

    momentum: Tensor

    def __init__(self, parameters: list[nn.Parameter], weights: list[Tensor], parts: Mapping[Tensor, tuple[int, ...]]) -> None:
        self._shards = _Shards.of(parameters)
        order = self._shards.order if self._shards else range(len(parameters))
        self.parameters, self.weights = [parameters[i] for i in order], [weights[i] for i in order]
        owned = self._shards.owned if self._shards else self.parameters
        # What `_orthogonalised` works on: the matrices of the parameters that are whole here, one beside the other.
        self._matrices = [shape for parameter in owned for shape in _matrices(parameter, parts)]
        # Of each weight here the rows of one matrix, and how much larger than an orthogonal matrix its update is.
        self._pieces: list[Tensor] = []
        self._scales: list[float] = []
        for i, weight in enumerate(self.weights):
            rows = weight.view(-1, weight.shape[-1])
            start = first_element(self.parameters[i]) // weight.shape[-1]
            ends = list(accumulate(shape[0] for shape in _matrices(self.parameters[i], parts)))
            for first, end in pairwise([0, *ends]):
                piece = rows[max(first - start, 0) : max(end - start, 0)]
                if len(piece):
                    self._pieces.append(piece)
                    self._scales.append(0.2 * math.sqrt(max(end - first, weight.shape[-1])))

    def step(self, skip: Tensor, rate: Tensor, weight_decay: float) -> None:
        gradient = side_by_side(gradients(self.parameters))
        momentum = torch.lerp(self.momentum, gradient, 1 - MOMENTUM)
        update = torch.lerp(gradient, momentum, MOMENTUM).bfloat16()
        self.momentum.copy_(torch.where(skip, self.momentum, momentum))
        if self._shards is None:
            update = self._orthogonalised(update)
        else:
            update = self._shards.scatter(self._orthogonalised(self._shards.gather(update)))
        # Skipped, it may be made of NaN.
        updates = laid_out(torch.where(skip, 0.0, update.float() * -rate), self._pieces)
        foreach_mul_(updates, self._scales)
        foreach_mul_(self._pieces, 1 - rate * weight_decay)
        foreach_add_(self._pieces, updates)

    def _orthogonalised(self, update: Tensor) -> Tensor:
        """Return what is made of matrices side by side."""
        result = torch.empty_like(update)
        same_shape: defaultdict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        sizes = [rows * columns for rows, columns in self._matrices]
        for shape, matrix, target in zip(self._matrices, update.split(sizes), result.split(sizes), strict=True):
            matrices, targets = same_shape[shape]
            matrices.append(matrix.view(shape))
            targets.append(target.view(shape))
        for matrices, targets in same_shape.values():
            foreach_copy_(targets, list(orthogonal(torch.stack(matrices)).contiguous().unbind()))
        return result


def _matrices(parameter: Tensor, parts: Mapping[Tensor, tuple[int, ...]]) -> list[tuple[int, int]]:
    # The shapes of the matrices that lie in a parameter (..., rows, columns), in their order.
    *leading, rows, columns = parameter.shape
    return [(part, columns) for _ in range(math.prod(leading)) for part in parts.get(parameter, (rows,))]


class _Shards:
    """How the shards of some parameters travel to the processes that gather them, and back.

    Vectors hold the parameters in `order`, which is by the process that gathers them.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        # The largest first, each to the process that has least to do.
        load, owner = [0.0] * self._size, [0] * len(parameters)
        for i in sorted(range(len(parameters)), key=lambda i: -_work(parameters[i])):
            owner[i] = load.index(min(load))
            load[owner[i]] += _work(parameters[i])
        self.order = sorted(range(len(parameters)), key=lambda i: owner[i])
        self.owned = [parameters[i] for i in self.order if owner[i] == self._rank]
        # How many elements go to each process, and of each process's shards of what is owned how many come.
        self._sent = [0] * self._size
        for parameter, rank in zip(parameters, owner, strict=True):
            self._sent[rank] += self._sizes(parameter)[self._rank]
        self._came = [self._sizes(parameter) for parameter in self.owned]

    @classmethod
    def of(cls, parameters: list[nn.Parameter]) -> "_Shards | None":
        """Return those of DTensors, None of whole parameters."""
        if not hasattr(parameters[0], "placements"):
            return None
        mesh, placements = parameters[0].device_mesh, parameters[0].placements  # pyright: ignore[reportAttributeAccessIssue]
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise UserError(
                "optimizer.name is muon, whose matrices can only be gathered from fsdp's shards: choose parallel fsdp"
            )
        return cls(parameters, mesh.get_group())

    def gather(self, shards: Tensor) -> Tensor:
        """Return the parameters that are owned here, whole and side by side, of the shards of all."""
        received = self._exchange(shards, self._sent, [sum(sizes) for sizes in zip(*self._came, strict=True)])
        by_process = received.split([*chain.from_iterable(zip(*self._came, strict=True))])
        count = len(self.owned)
        return torch.cat([by_process[rank * count + i] for i in range(count) for rank in range(self._size)] or [received])

    def scatter(self, whole: Tensor) -> Tensor:
        """Return the shards of all parameters, of those that are owned and whole here: the way back."""
        by_parameter = whole.split([*chain.from_iterable(self._came)])
        count = range(len(self.owned))
        sent = torch.cat([by_parameter[i * self._size + rank] for rank in range(self._size) for i in count] or [whole])
        return self._exchange(sent, [sum(sizes) for sizes in zip(*self._came, strict=True)], self._sent)

    def _sizes(self, parameter: Tensor) -> list[int]:
        # Elements of each process's shard, as `torch.chunk` cuts.
        length = parameter.shape[0]
        ends = [min(rank * -(-length // self._size), length) for rank in range(self._size + 1)]
        return [(end - start) * (parameter.numel() // length) for start, end in pairwise(ends)]

    def _exchange(self, sent: Tensor, sizes: Sequence[int], sizes_back: Sequence[int]) -> Tensor:
        # Of one process without parameters to gather, the sums above are over nothing.
        sizes, sizes_back = (list(each) or [0] * self._size for each in (sizes, sizes_back))
        received = sent.new_empty(sum(sizes_back))
        # Bytes, as gloo knows no bfloat16.
        width = sent.itemsize
        dist.all_to_all_single(
            received.view(torch.uint8), sent.contiguous().view(torch.uint8), [width * n for n in sizes_back],
            [width * n for n in sizes], self._group,
        )  # fmt: skip
        return received


def _work(parameter: Tensor) -> float:
    # In proportion to the FLOPs of the products of matrices with their transposes.
    return parameter.numel() * min(parameter.shape[-2:])
