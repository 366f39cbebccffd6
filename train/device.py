"""Choose the device and dtype of a run, and configure the CUDA allocator."""

import os
import re

import torch

from ..errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return the device named `auto`, `cuda`, `cuda:N` or `cpu`; `auto` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device is {name!r}: expected auto, cuda, cuda:N or cpu")
    device = torch.device(name)
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise UserError(f"device is {name!r}, but torch.cuda finds {num_gpus} GPUs: expected auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype outside of FP8 products; `auto` is bfloat16 on GPUs that support it, else float32."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if name.startswith("fp8") else getattr(torch, name)


def prepare_allocator(device: torch.device) -> None:
    """Enable expandable segments in the CUDA allocator, which reduces fragmentation with batches of several shapes.

    Call this before the first tensor is allocated on the GPU. Allocator settings from the environment take precedence.
    """
    set_up = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if device.type == "cuda" and not set_up:
        # The allocator reads the setting at each allocation, so CUDA may be initialized already.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
