from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import layer_norm, reference, use_backend
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

EPS = 1e-5
# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Odd; one, three and five blocks; too wide for registers in the backward pass, and in both passes.
WIDTHS = [7, 64, 127, 320, 1000, 8193, 33000]


def gradients(function, inputs, dy):
    """Return the result and the gradient of every input that is a tensor."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, EPS)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))


def check(x, weight, bias, dy):
    inputs = x, weight, bias
    with use_backend("triton"), poisoned_memory():
        actual = gradients(layer_norm, inputs, dy)
    expected = gradients(reference.layer_norm, inputs, dy)
    exact = gradients(reference.layer_norm, [None if t is None else t.double() for t in inputs], dy.double())
    for number, tensors in enumerate(zip(actual, expected, exact, strict=True)):
        assert_accurate(*tensors, what=f"result or gradient {number}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_equal_reference(device, dtype, width):
    torch.manual_seed(width)
    x, dy = torch.randn(2, 5, 3, width, dtype=dtype, device=device)[:, :, 0]
    weight, bias = torch.randn(2, width, dtype=dtype, device=device)
    check(x, weight, bias, dy)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    num_rows=st.integers(1, 70),
    # With fewer elements a gradient may cancel to less than the rounding of its terms, which the oracle does not tolerate.
    width=st.integers(8, 300),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
    mean=st.sampled_from([0.0, 1.0, -20.0]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    weight_dtype=st.sampled_from([torch.float32, torch.float16, None]),
    bias_dtype=st.sampled_from([torch.float32, torch.float16, None]),
    seed=st.integers(0, 99),
)
def test_any_shape_scale_and_form(num_rows, width, scale, mean, dtype, weight_dtype, bias_dtype, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(num_rows, width, generator=generator) for _ in range(2))
    x = ((x + mean) * scale).to(device, dtype)
    weight, bias = (
        None if t is None else torch.randn(width, generator=generator).to(device, t) for t in (weight_dtype, bias_dtype)
    )
    check(x, weight, bias, dy.to(device, dtype))


@pytest.mark.parametrize("width", [64, 1280, 8192, 70_000])
@pytest.mark.parametrize("mean", [1e2, 1e4, -1e6])
def test_large_mean_is_as_accurate_as_pytorch(device, width, mean):
    torch.manual_seed(width)
    x = torch.randn(4, width, device=device) + mean
    exact = F.layer_norm(x.double(), (width,), eps=EPS)
    with use_backend("triton"):
        error = (layer_norm(x).double() - exact).abs().max().item()
    assert error <= 1.1 * (F.layer_norm(x, (width,), eps=EPS).double() - exact).abs().max().item()


@pytest.mark.parametrize("width", [64, 70_000])
def test_large_element_is_as_accurate_as_pytorch(device, width):
    torch.manual_seed(width)
    x = torch.randn(4, width, device=device)
    x[:, 0] = 1e5
    exact = F.layer_norm(x.double(), (width,), eps=EPS)
    with use_backend("triton"):
        error = (layer_norm(x).double() - exact).abs().max().item()
    assert error <= 2 * (F.layer_norm(x, (width,), eps=EPS).double() - exact).abs().max().item() + 1e-7


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_equals_pytorch(device, backend):
    torch.manual_seed(0)
    x = 3 + torch.randn(4, 5, 33, device=device)
    weight, bias = torch.randn(2, 33, device=device)
    with use_backend(backend):
        for vectors in product((None, weight), (None, bias)):
            torch.testing.assert_close(layer_norm(x, *vectors), F.layer_norm(x, (33,), *vectors, 1e-5))
            torch.testing.assert_close(layer_norm(x, *vectors, eps=0.5), F.layer_norm(x, (33,), *vectors, 0.5))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, ::2], id="every other column"),
        pytest.param(lambda t: t[::2], id="every other row"),
        pytest.param(lambda t: t[:, 3:40], id="slice of the columns"),
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[:1].expand(20, -1), id="expanded rows"),
        pytest.param(lambda t: t.unflatten(0, (4, 5)).transpose(0, 1), id="transposed leading dimensions"),
    ],
)
def test_strided_inputs_and_gradients(device, view):
    torch.manual_seed(0)
    x, dy = (view(torch.randn(20, 48, device=device)) for _ in range(2))
    weight, bias = torch.randn(2, 2 * x.shape[-1], device=device)[:, ::2]
    check(x, weight, bias, dy)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8), (0, 40_000)])
def test_leading_shapes(device, shape):
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape, device=device)
    weight, bias = torch.randn(2, shape[-1], device=device)
    check(x, weight, bias, dy)


def test_constant_rows_give_the_bias(device):
    x, bias = torch.full((4, 16), 7.0, device=device), torch.randn(16, device=device)
    with use_backend("triton"):
        torch.testing.assert_close(layer_norm(x, bias=bias), bias.expand(4, -1))


@pytest.mark.parametrize(
    ("wanted", "width"),
    [
        *((wanted, 16) for wanted in list(product([False, True], repeat=3))[1:]),
        ((True, False, False), 40_000),
        ((False, True, False), 40_000),
        ((False, False, True), 40_000),
    ],
)
def test_computes_only_needed_gradients(device, wanted, width):
    torch.manual_seed(0)
    tensors = [torch.randn(4, width), torch.randn(width), torch.randn(width).half()]

    def grads(function):
        leaves = [t.to(device).requires_grad_(is_wanted) for t, is_wanted in zip(tensors, wanted, strict=True)]
        function(*leaves).sin().sum().backward()
        return [t.grad for t in leaves]

    with use_backend("triton"), poisoned_memory():
        actual = grads(layer_norm)
    for is_wanted, a, b in zip(wanted, actual, grads(reference.layer_norm), strict=True):
        assert (a is not None) == is_wanted
        if is_wanted:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(30, 65), (5, 40_000)])
def test_gradients_are_bitwise_repeatable(device, rows, width):
    torch.manual_seed(0)
    x, dy = torch.randn(2, rows, width, device=device)
    weight, bias = torch.randn(2, width, device=device)
    with use_backend("triton"):
        first, second = (gradients(layer_norm, (x, weight, bias), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reference_passes_gradcheck():
    x, weight, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,), (5,)))
    assert torch.autograd.gradcheck(reference.layer_norm, (x, weight, bias))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 8), torch.ones(7)), r"weight has shape \(7,\).*\(8,\)"),
        ((torch.ones(2, 8), None, torch.ones(1)), r"bias has shape \(1,\).*\(8,\)"),
        ((torch.ones(()),), r"x has shape \(\).*\(\.\.\., D\)"),
        ((torch.ones(2, 0),), r"x has shape \(2, 0\)"),
        ((torch.ones(2, 8, dtype=torch.int64),), "x has dtype torch.int64: expected .*torch.float64"),
        ((torch.ones(2, 8), torch.ones(8), torch.ones(8, dtype=torch.bool)), "bias has dtype torch.bool"),
        ((torch.ones(2, 8), None, None, "1e-5"), "eps is '1e-5': expected a finite number"),
        ((torch.ones(2, 8), torch.ones(8, device="meta")), "weight is on meta: expected c"),
    ],
)
def test_bad_arguments_raise(device, backend, arguments, message):
    arguments = [t.to(device) if isinstance(t, torch.Tensor) and not t.is_meta else t for t in arguments]
    with use_backend(backend), pytest.raises(ValueError, match=message):
        layer_norm(*arguments)


def test_float64_runs_reference(device):
    x, weight = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    with use_backend("triton"):
        for inputs in ((x.double(), weight), (x, weight.double()), (x, None, weight.double())):
            assert torch.equal(layer_norm(*inputs), reference.layer_norm(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_gives_float32_like_pytorch(backend):
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(2, 64, device="cuda")
    with use_backend(backend), torch.autocast("cuda", torch.bfloat16):
        y = layer_norm(x, weight, bias)
        expected = F.layer_norm(x, (64,), weight, bias)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected)


def test_float32_result_of_half_input_has_half_gradients(device):
    # The dtypes that autocast requests, on any device.
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 40, device=device)
    x, weight = x.half().requires_grad_(), torch.randn(40, device=device)
    y, _, _ = torch.ops.tilewright.layer_norm(x, weight, None, EPS, torch.float32)
    expected = reference.layer_norm(x.float(), weight, None, EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)))
