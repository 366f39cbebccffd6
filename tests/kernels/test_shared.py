"""What the ops share."""

import pytest
import torch
from torch import Tensor

from tilewright.kernels.shared import register_fake


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
