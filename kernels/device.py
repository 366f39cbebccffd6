"""Properties of a device: its product, and the sizes that launches depend on."""

from functools import cache

import torch

from ..datasheet import GPU, GPUS


def gpu_of(device: torch.device | str) -> GPU | None:
    """Return the datasheet figures of the GPU `device`; None for a CPU, and for a product that is not in the table."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return GPUS.get(torch.cuda.get_device_name(device))


def device_name(device: torch.device | str) -> str:
    """Return the product name that the driver reports, or `CPU`."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


@cache
def num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 2 in the interpreter, enough to exercise persistent kernels."""
    if device.type == "meta":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache; 1 MiB in the interpreter, enough to exercise program orders."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**20
