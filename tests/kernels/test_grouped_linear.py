import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from oracle import assert_accurate
from tilewright.kernels import grouped_linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def random_groups(sizes, d_in, d_out, dtype, seed=0):
    """Return random x, weight and dy for groups of these numbers of rows, and the ends of the groups."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(sizes), d_in), (len(sizes), d_out, d_in), (sum(sizes), d_out))
    # Float64 has no more exact oracle. Sums of products of bfloat16 values are exact in it, in any order.
    drawn = torch.bfloat16 if dtype == torch.float64 else torch.float32
    tensors = [torch.randn(shape, generator=generator).to(drawn).to(dtype) for shape in shapes]
    return *tensors, torch.tensor(sizes).cumsum(0, dtype=torch.int32)


def gradients(function, x, weight, dy, ends):
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    y = function(x, weight, ends)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    d_in=st.sampled_from([1, 8, 12, 16]),
    d_out=st.sampled_from([1, 8, 24]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_each_group_uses_its_own_matrix(sizes, d_in, d_out, dtype, seed):
    *inputs, ends = random_groups(sizes, d_in, d_out, dtype, seed)
    exact = gradients(reference.grouped_linear, *(x.double() for x in inputs), ends)
    plain = gradients(reference.grouped_linear, *inputs, ends)
    actual = gradients(grouped_linear, *inputs, ends)
    for name, *tensors in zip(("y", "dx", "dweight"), actual, plain, exact, strict=True):
        assert_accurate(*tensors, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_calls_are_bitwise_repeatable(device, dtype):
    *inputs, ends = (tensor.to(device) for tensor in random_groups([5, 0, 11], 16, 24, dtype))
    first, second = (gradients(grouped_linear, *inputs, ends) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_expanded_upstream_gradient():
    *inputs, ends = random_groups([5, 0, 11], 16, 24, torch.bfloat16)
    x, weight, dy = inputs
    expected = gradients(grouped_linear, x, weight, torch.ones_like(dy), ends)
    actual = gradients(grouped_linear, x, weight, torch.ones((), dtype=dy.dtype).expand_as(dy), ends)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_flops_count_one_matrix_per_row():
    *inputs, ends = random_groups([5, 0, 11], 16, 24, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        gradients(grouped_linear, *inputs, ends)
    assert counter.get_total_flops() == 3 * 2 * 16 * 16 * 24


def test_wrong_shapes_and_dtypes_raise():
    x, weight, _, ends = random_groups([5, 3], 16, 24, torch.float32)
    with pytest.raises(ValueError, match=r"x has shape \(8, 15\), .* expected \(N, K\), \(E, F, K\) and \(E\)"):
        grouped_linear(x[:, 1:], weight, ends)
    with pytest.raises(ValueError, match=r"ends \(1,\): expected"):
        grouped_linear(x, weight, ends[:1])
    with pytest.raises(ValueError, match=r"ends torch.int64: expected equal dtypes, and int32"):
        grouped_linear(x, weight, ends.long())
