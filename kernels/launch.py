"""Launches of Triton kernels: the one way there, which can also write down what would be launched on a GPU that is not here."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, num_programs: int, *args: Any, **constants: Any) -> None:
    """Run `num_programs` programs of a kernel on the device of its first tensor, because Triton launches on the current one."""
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(num_programs,)](*args, **constants)
        return
    with torch.cuda.device(device):
        kernel[(num_programs,)](*args, **constants)
