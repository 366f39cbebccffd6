"""The device of a run: which one it is, what it computes in, and how its process is set up for long work."""

import os
import re

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
    """Return the dtype of all that is not in 8 bits: `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if name.startswith("fp8") else getattr(torch, name)


def prepare_allocator(device: torch.device) -> None:
    """Let the GPU's memory grow in pages that can be joined, so that batches of several shapes do not fragment it.

    To be called before the first tensor is put on the GPU; whoever has set the allocator up already is left alone.
    """
    set_up = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if device.type == "cuda" and not set_up:
        # Read at each allocation, so that CUDA may have been asked for its memory or its dtypes before.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
