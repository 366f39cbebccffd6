"""What the ops share."""

import pytest
import torch
from torch import Tensor

from tilewright.kernels.dispatch import HAS_TRITON, jit, tl
from tilewright.kernels.shared import register_fake, tanh


@torch.library.custom_op("tilewright_tests::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return 2 * x


@register_fake(_twice)
def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_no_message_of_what_leads_to_an_op_is_written_for_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Such a message doubles with each use of a result: with 12 layers below the loss it never ended.
    from torch._inductor.exc import OperatorIssue

    written = []
    monkeypatch.setattr(OperatorIssue, "operator_str", staticmethod(lambda *args: written.append(args) or ""))
    x = torch.randn(4)
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(_twice, fullgraph=True)(x), 2 * x)
    assert written == []


def test_the_function_itself_stays_as_it_is() -> None:
    assert _empty_like(torch.ones(3)).shape == (3,)


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
def test_tanh_is_right_to_a_few_units_in_the_last_place_however_small_its_argument(device: torch.device) -> None:
    tiny, middle = torch.logspace(-37, 0, 4096), torch.linspace(-12.0, 12.0, 61_440)
    x = torch.cat([tiny, middle]).to(device)
    exact = torch.tanh(x.double())
    units = (_tanh_of(x).double() - exact).abs() / (torch.finfo(torch.float32).eps * exact.abs())
    assert units[:4096].max() <= 4
    assert units.nan_to_num(0.0).max() <= 4


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_tanh_of_what_is_infinite_huge_zero_or_no_number(device: torch.device) -> None:
    values = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, 100.0, -100.0, 0.0, -0.0, float("nan")], device=device)
    y = _tanh_of(values.repeat(1024)[:1024])[: len(values)]
    assert y[:-1].tolist() == [1, -1, 1, -1, 1, -1, 0, 0]
    assert y[-1].isnan()
