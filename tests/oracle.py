"""The tolerance for kernels: at most twice the error of the reference in the same dtype, plus one rounding."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_accurate(actual: Tensor, reference: Tensor, exact: Tensor, what: str = "result", slack: float = 0.0) -> None:
    """Compare `actual` with `exact`, the float64 oracle, and with `reference`, PyTorch's result in the same dtype.

    `slack` allows for the rounding of terms that cancel, whose size the result does not show.
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
    """Fill uninitialized tensors with NaN, so that an element that a kernel does not write is detected."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_replays(step: Callable[[], Sequence[Tensor]]) -> None:
    """Capture `step`, which must not synchronize, in a CUDA graph; a replay must equal an eager call bit by bit."""
    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Set only after the capture began, because PyTorch 2.13 synchronizes when it begins a capture.
        torch.cuda.set_sync_debug_mode("error")
        try:
            captured = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
