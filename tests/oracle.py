"""What "right" means for a kernel: at most twice the error of the same-dtype reference, plus one rounding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_accurate(actual: Tensor, reference: Tensor, exact: Tensor, what: str = "result", slack: float = 0.0) -> None:
    """`exact` is the float64 oracle; `reference` the PyTorch form in the dtype of `actual`.

    `slack` is the rounding of terms that cancel, where the result says too little about their size.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == reference.dtype, f"{what}: {actual.dtype}, expected {reference.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if exact.numel() == 0:
        return
    error, allowed = ((t.double() - exact).abs().max().item() for t in (actual, reference))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowed + rounding + slack, f"{what}: error {error:.3e}, the reference has {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor begins as NaN, so that an element which a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_replays(step: Callable[[], Sequence[Tensor]]) -> None:
    """Capture `step` in a CUDA graph, where it may not synchronise; a replay must give the bits of a call."""
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Not before: to begin a graph PyTorch 2.13 synchronises itself.
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
