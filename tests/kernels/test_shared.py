"""Math functions that kernels share."""

import pytest
import torch
from torch import Tensor

from tilewright.kernels.dispatch import HAS_TRITON, jit, tl
from tilewright.kernels.shared import tanh


@jit
def _tanh(x_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tanh(tl.load(x_ptr + columns)))


def _tanh_of(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _tanh[(len(x) // 1024,)](x, y, BLOCK=1024)
    return y


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_tanh_is_accurate_to_4_units_in_the_last_place(device: torch.device) -> None:
    tiny, middle = torch.logspace(-37, 0, 4096), torch.linspace(-12.0, 12.0, 61_440)
    x = torch.cat([tiny, middle]).to(device)
    exact = torch.tanh(x.double())
    units = (_tanh_of(x).double() - exact).abs() / (torch.finfo(torch.float32).eps * exact.abs())
    assert units[:4096].max() <= 4
    assert units.nan_to_num(0.0).max() <= 4


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_tanh_of_infinite_huge_zero_and_nan(device: torch.device) -> None:
    values = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, 100.0, -100.0, 0.0, -0.0, float("nan")], device=device)
    y = _tanh_of(values.repeat(1024)[:1024])[: len(values)]
    assert y[:-1].tolist() == [1, -1, 1, -1, 1, -1, 0, 0]
    assert y[-1].isnan()
