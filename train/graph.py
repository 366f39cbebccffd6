"""A whole training step as one CUDA graph, so that the host asks for it in one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

# They compile, choose algorithms and make the optimizer's state, none of which a graph can hold.
EAGER_STEPS = 3


class StepGraph:
    """Calls `step(*batch)`: the first times as it is, then once to record it, and from there on as a graph.

    All that `step` reads beside the batch must stay where it is, and be changed in place; the host must not wait in it. Batches
    have the shapes of the first one. What it returns is overwritten by the next call. What lives for a step only, such as
    activations and gradients, has memory that is the graph's own.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]]) -> None:
        self._step = step
        self._eager_left = EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Take a step."""
        if self._eager_left:
            self._eager_left -= 1
            return self._step(*batch)
        if self._graph is None:
            self._batch = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            # Only of this thread: another one pins the memory of the batches to come meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = self._step(*self._batch)
            self._graph = graph
        for mine, tensor in zip(self._batch, batch, strict=True):
            # One row would be copied to all.
            assert mine.shape == tensor.shape
            mine.copy_(tensor)
        self._graph.replay()
        return self._results
