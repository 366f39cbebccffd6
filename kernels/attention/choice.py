"""Which of attention's kernels run on a GPU of Hopper's generation: portable ones, or those in Gluon, two backward or one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

AttentionKernel = Literal["auto", "portable", "gluon", "fused"]
FORMS: tuple[AttentionKernel, ...] = ("portable", "gluon", "fused")

_chosen: AttentionKernel = "auto"


def get_attention_kernel() -> AttentionKernel:
    """Return the choice in force: `auto` runs what the bench found faster on a GPU."""
    return _chosen


def set_attention_kernel(kernel: AttentionKernel) -> None:
    """Choose attention's kernels for the whole process: `auto`, `portable`, or, wherever they can serve, `gluon` or `fused`.

    In Gluon there are kernels for Hopper, in half precision, for tensors that TMA can describe and head dims from 33 to 256,
    of which the backward pass takes those up to 128, and with a softcap dK and dV up to 64; elsewhere the portable ones run,
    without a message. `fused` is `gluon` with one kernel for all gradients, of causal attention with head dims from 65 to 128,
    as many queries as keys, and no window, documents, lengths of a cache or softcap; its backward pass holds 4 bytes more for
    each query, head and channel of 128. A call's backward pass has the choice of the call.
    """
    global _chosen
    if kernel not in get_args(AttentionKernel):
        raise ValueError(f"attention kernel {kernel!r} is unknown: choose one of {', '.join(get_args(AttentionKernel))}")
    _chosen = kernel


@contextmanager
def use_attention_kernel(kernel: AttentionKernel) -> Iterator[None]:
    """Run a block with another choice."""
    before = get_attention_kernel()
    set_attention_kernel(kernel)
    try:
        yield
    finally:
        set_attention_kernel(before)
