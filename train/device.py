"""The device of a run: which one it is, what it computes in, and how its process is set up for long work."""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cuda`, `cuda:1` or `cpu` means here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device {name!r} is unknown: choose auto, cuda, cuda:N or cpu")
    device = torch.device(name)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise UserError(f"device {name!r} is not there: torch.cuda finds {num_gpus} GPUs; choose auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, name)


def prepare_allocator(device: torch.device) -> None:
    """Let the GPU's memory grow in pages that can be joined, so that batches of several shapes do not fragment it.

    To be called before the first tensor is put on the GPU; whoever has set the allocator up already is left alone.
    """
    set_up = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if device.type == "cuda" and not set_up:
        # Read at each allocation, so that CUDA may have been asked for its memory or its dtypes before.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Keep Python's garbage collector from stopping a step: what lives now is never looked at again inside the block.

    Whoever loops inside calls `gc.collect()` where a pause does no harm.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
