"""Select the attention kernels on Hopper: portable Triton, or Gluon with a two-kernel or a fused backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

AttentionKernel = Literal["auto", "portable", "gluon", "fused"]
FORMS: tuple[AttentionKernel, ...] = ("portable", "gluon", "fused")

_chosen: AttentionKernel = "auto"


def get_attention_kernel() -> AttentionKernel:
    """Return the current choice: `auto` selects the kernels that the benchmark found faster."""
    return _chosen


def set_attention_kernel(kernel: AttentionKernel) -> None:
    """Set the attention kernels for the whole process: `auto`, `portable`, `gluon` or `fused`.

    The Gluon kernels run on Hopper in half precision, on tensors that TMA can describe. The forward pass supports head dims
    from 33 to 256. The backward pass supports head dims up to 128; with a softcap, dK and dV up to 64. `fused` is `gluon` with
    one backward kernel for all gradients. It supports causal attention with head dims from 65 to 128, as many queries as keys,
    and no window, documents, cache lengths or softcap. It allocates 4 more bytes per query, head and channel (padded to 128).

    Unsupported calls silently fall back to the portable kernels. The backward pass of a call uses the choice that was current
    in the forward pass.
    """
    global _chosen
    if kernel not in get_args(AttentionKernel):
        raise ValueError(f"attention kernel is {kernel!r}: expected one of {', '.join(get_args(AttentionKernel))}")
    _chosen = kernel


@contextmanager
def use_attention_kernel(kernel: AttentionKernel) -> Iterator[None]:
    """Use another choice within a `with` block."""
    before = get_attention_kernel()
    set_attention_kernel(kernel)
    try:
        yield
    finally:
        set_attention_kernel(before)
