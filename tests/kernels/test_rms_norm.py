import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import add_rms_norm, reference, rms_norm, use_backend
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

EPS = 1e-5
# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# 1, odd, prime, a power of two, more than a tile of narrow rows, and wider than one block of the backward and forward pass.
WIDTHS = [1, 7, 64, 127, 1000, 8193, 33000]


def gradients(function, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))


def check(x, weight, dy):
    with use_backend("triton"), poisoned_memory():
        actual = gradients(rms_norm, x, weight, dy)
    expected = gradients(reference.rms_norm, x, weight, dy)
    exact = gradients(reference.rms_norm, x.double(), weight.double(), dy.double())
    for what, *tensors in zip(("y", "dx", "dweight"), actual, expected, exact, strict=True):
        assert_accurate(*tensors, what=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_equal_the_reference(device, dtype, width):
    torch.manual_seed(width)
    x, dy = torch.randn(2, 5, 3, width, dtype=dtype, device=device)[:, :, 0]
    check(x, torch.randn(width, dtype=dtype, device=device), dy)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(num_rows=st.integers(1, 70), width=st.integers(1, 300), seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 1.0, 1e3]))
def test_any_shape_and_scale(num_rows, width, seed, scale):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(num_rows, width, generator=generator).to(device) for _ in range(2))
    check(x * scale, torch.randn(width, generator=generator).to(device), dy)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_weight_and_activations_of_other_dtypes(device, weight_dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 6, 40, dtype=torch.float16, device=device)
    check(x, torch.randn(40, dtype=weight_dtype, device=device), dy)


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
    x, dy = view(torch.randn(20, 48, device=device)), view(torch.randn(20, 48, device=device))
    check(x, torch.randn(x.shape[-1], device=device), dy)


def test_strided_weight(device):
    torch.manual_seed(0)
    check(torch.randn(3, 10, device=device), torch.randn(20, device=device)[::2], torch.randn(3, 10, device=device))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8)])
def test_leading_shapes(device, shape):
    check(torch.randn(shape, device=device), torch.randn(8, device=device), torch.randn(shape, device=device))


def test_zero_rows_stay_zero_and_finite(device):
    check(torch.zeros(4, 16, device=device), torch.ones(16, device=device), torch.randn(4, 16, device=device))


def test_only_what_is_needed_is_differentiated(device):
    x = torch.randn(4, 16, device=device)
    weight = torch.randn(16, device=device, requires_grad=True)
    with use_backend("triton"):
        rms_norm(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_gradients_are_bitwise_repeatable(device):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 300, 65, device=device)
    weight = torch.randn(65, device=device)
    with use_backend("triton"):
        first, second = (gradients(rms_norm, x, weight, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_add_rms_norm_returns_the_new_residual(device):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 33, device=device)
    weight = torch.randn(33, device=device)
    with use_backend("triton"):
        y, total = add_rms_norm(x, residual, weight)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, reference.rms_norm(x + residual, weight))


def test_the_reference_passes_gradcheck():
    x, weight = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(reference.rms_norm, (x, weight))


def test_the_op_is_registered_as_pytorch_asks(device):
    x, weight = torch.randn(2, 3, 8, device=device, requires_grad=True), torch.randn(8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.tilewright.rms_norm, (x, weight, EPS))


@pytest.mark.slow
def test_compiled_equals_eager(device):
    x, weight = torch.randn(6, 32, device=device), torch.randn(32, device=device)

    def branch(x, weight, eps):
        return rms_norm(x * 2, weight, eps) + 1

    with use_backend("triton"):
        eager = gradients(branch, x, weight, torch.ones_like(x))
        compiled = gradients(torch.compile(branch, fullgraph=True), x, weight, torch.ones_like(x))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_flops_are_counted_as_none(device):
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        rms_norm(torch.randn(2, 8, device=device), torch.randn(8, device=device))
    assert torch.ops.tilewright.rms_norm in counter.flop_registry
    assert counter.get_total_flops() == 0


def test_double_backward_is_a_clear_error(device):
    x, weight = torch.randn(2, 8, device=device, requires_grad=True), torch.randn(8, device=device)
    with use_backend("triton"):
        (dx,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="rms_norm_backward"):
            dx.sum().backward()


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\(7,\).*\(8,\)"):
        rms_norm(torch.randn(2, 8), torch.randn(7))


@pytest.mark.gpu
def test_runs_inside_a_cuda_graph_without_synchronising():
    x, weight = torch.randn(64, 1024, device="cuda"), torch.randn(1024, device="cuda")
    expected = rms_norm(x, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = rms_norm(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_autocast_computes_in_float32_like_pytorch():
    x, weight = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16), torch.randn(64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert rms_norm(x, weight).dtype == torch.nn.functional.rms_norm(x, (64,), weight).dtype == torch.float32
