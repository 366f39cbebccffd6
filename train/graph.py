"""Capture a whole training step as one CUDA graph, which the host starts with a single launch."""

from collections.abc import Callable

import torch
from torch import Tensor

# The first steps compile, select algorithms and allocate optimizer state, which cannot be captured.
EAGER_STEPS = 3


class StepGraph:
    """Calls `step(*batch)` eagerly for the first steps, then captures it once and replays the graph.

    Every tensor that `step` reads, other than the batch, must keep its address and be updated in place. `step` must not
    synchronize with the host. All batches have the shapes of the captured one. Each call overwrites the results of the call
    before. Activations and gradients are allocated in the graph's private memory pool.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]]) -> None:
        self._step = step
        self._eager_left = EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Take a step and return its results."""
        if self._eager_left:
            self._eager_left -= 1
            return self._step(*batch)
        if self._graph is None:
            self._batch = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            # Restrict capture to this thread: the prefetch thread pins memory during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = self._step(*self._batch)
            self._graph = graph
        for static, tensor in zip(self._batch, batch, strict=True):
            # copy_ would broadcast a smaller batch silently.
            assert static.shape == tensor.shape
            static.copy_(tensor)
        self._graph.replay()
        return self._results
