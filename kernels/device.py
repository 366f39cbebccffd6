"""What the device at hand says of itself: its product, and the sizes that launches are made for."""

from functools import cache

import torch

from .datasheet import GPU, GPUS


def gpu_of(device: torch.device | str) -> GPU | None:
    """Return the figures of the GPU behind `device`, or None for a CPU and for a product that is not in the table."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return GPUS.get(torch.cuda.get_device_name(device))


def device_name(device: torch.device | str) -> str:
    """Return the product's name as its driver reports it, or `CPU`."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


@cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 2 where kernels are interpreted, enough to exercise the persistence."""
    if device.type == "meta":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache; 1 MiB where kernels are interpreted, enough to exercise orders of programs."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**20
