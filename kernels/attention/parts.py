"""Split the query heads of a key-value head over several programs if there are too few programs to fill the GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import num_sms


def parts_of(group_size: int, num_programs: int, device: torch.device) -> int:
    """Return the number of parts into which to split `group_size` query heads; `num_programs` is the count without a split."""
    wanted = -(-2 * num_sms(device) // max(num_programs, 1))
    return next(n for n in range(1, group_size + 1) if group_size % n == 0 and (n >= wanted or n == group_size))


def parts_for(dk: Tensor, dv: Tensor, group_size: int, num_programs: int) -> tuple[int, list[Tensor], list[int]]:
    """Return (number of parts, output tensors, strides between parts).

    The outputs are dk and dv themselves for one part, else float32 buffers (parts, B, Hkv, S, K) for `sum_parts`.
    """
    num_parts = parts_of(group_size, num_programs, dk.device)
    if num_parts == 1:
        return 1, [dk, dv], [0, 0]
    parts = [t.new_empty(num_parts, *t.shape, dtype=torch.float32) for t in (dk, dv)]
    return num_parts, parts, [part.stride(0) for part in parts]


def sum_parts(gradients: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Fill the gradients with the sums of the parts' outputs, in a fixed order."""
    for t, part in zip(gradients, parts, strict=True):
        if part is not t:
            t.copy_(part.sum(dim=0))
