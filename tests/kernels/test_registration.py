"""Registration of ops with PyTorch, and calls that skip the dispatcher."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.kernels.registration import count_no_flops, custom_op

CALLS = []


@custom_op("twice_of_a_test")
def twice(x: Tensor) -> Tensor:
    CALLS.append(torch.is_grad_enabled())
    return 2 * x


@twice.register_fake
def empty_twice(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, dy: twice(dy), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))


@custom_op("add_one_of_a_test", mutates_args=("x",))
def add_one_(x: Tensor) -> None:
    x.add_(1)


add_one_.register_fake(lambda x: None)


@custom_op("square_of_a_test")
def square(x: Tensor) -> Tensor:
    return x * x


square.register_fake(torch.empty_like)
count_no_flops(twice, add_one_, square)


class RecordOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", [twice, torch.ops.tilewright.twice_of_a_test])
def test_direct_and_dispatched_calls_agree(call):
    x = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    assert gradient.tolist() == [2, 2, 2]
    assert not call(x.detach()).requires_grad
    with torch.no_grad():
        assert not call(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(call(x), 2 * x)


def test_modes_profiler_and_subclasses_see_the_op():
    x = torch.randn(3)
    with RecordOps() as recorded:
        twice(x)
    assert recorded.names == ["tilewright::twice_of_a_test"]
    with torch.profiler.profile() as profiler:
        twice(x)
    assert "tilewright::twice_of_a_test" in {event.name for event in profiler.events()}
    subclass = torch.nn.Buffer(x).as_subclass(type("Sub", (Tensor,), {}))
    with RecordOps() as recorded:
        twice(subclass)
    assert recorded.names == ["tilewright::twice_of_a_test"]


def test_meta_tensors_and_fakes_do_not_call_the_function():
    CALLS.clear()
    assert twice(torch.empty(3, device="meta")).is_meta
    assert CALLS == []
    assert empty_twice(torch.ones(3)).shape == (3,)


def test_op_without_gradient_raises():
    x = torch.randn(3, requires_grad=True)
    for call in (square, torch.ops.tilewright.square_of_a_test):
        with pytest.raises(NotImplementedError, match="square_of_a_test has no gradient"):
            call(x).sum().backward()


def test_forward_mode_raises():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative: use_backend\('reference'\) has"):
            torch.ops.tilewright.twice_of_a_test(dual)


@pytest.mark.parametrize("call", [add_one_, torch.ops.tilewright.add_one_of_a_test])
def test_mutated_tensor_fails_in_backward(call):
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    z = y.square()
    call(y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_inductor_formats_no_missing_operator_message(monkeypatch):
    # The message doubles with each use of a result: with 12 layers below the loss, formatting did not finish.
    from torch._inductor.exc import OperatorIssue

    messages = []
    monkeypatch.setattr(OperatorIssue, "operator_str", staticmethod(lambda *args: messages.append(args) or ""))
    x = torch.randn(4)
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(lambda x: twice(x), fullgraph=True)(x), 2 * x)
    assert messages == []
