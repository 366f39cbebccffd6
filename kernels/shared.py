"""What several ops share: inputs as rows, and the FLOP formula of those that multiply no matrices."""

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def as_rows(x: Tensor) -> Tensor:
    """Return `x` (..., D) as (rows, D); copied only where no one stride reaches its rows or their elements are no neighbours.

    Slices and rows repeated by a stride of 0 are fine: the kernels take their stride.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def count_no_flops(*ops: Any) -> None:
    """Register a formula of 0: FlopCounterMode counts matrix products only, and this says that the ops were not forgotten."""
    register_flop_formula(ops)(lambda *args, **kwargs: 0)
