from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import add_rms_norm, reference, rms_norm, use_backend
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

EPS = 1e-5
# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Odd; prime; a power of two; more than a tile of narrow rows; wider than a block in the backward pass, and in both passes.
WIDTHS = [7, 64, 127, 1000, 8193, 33000]
# With fewer elements a gradient may cancel to less than the rounding of its terms, which the oracle does not tolerate.
ROW_WIDTHS = st.integers(8, 300)


def gradients(function, inputs, upstream, **options):
    """Return the results and the gradient of every input that is a tensor; skip results whose upstream gradient is None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    results = function(*leaves, EPS, **options)
    results = results if isinstance(results, tuple) else (results,)
    used = [(result, grad.to(result.dtype)) for result, grad in zip(results, upstream, strict=True) if grad is not None]
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad([r for r, _ in used], wanted, [g for _, g in used], materialize_grads=True)
    return *(result.detach() for result in results), *grads


def compare(function, oracle, inputs, upstream, **options):
    with use_backend("triton"), poisoned_memory():
        actual = gradients(function, inputs, upstream, **options)
    expected = gradients(oracle, inputs, upstream, **options)
    wide = [None if t is None else t.double() for t in inputs]
    exact = gradients(oracle, wide, [None if t is None else t.double() for t in upstream], **options)
    for number, tensors in enumerate(zip(actual, expected, exact, strict=True)):
        assert_accurate(*tensors, what=f"result or gradient {number}")


def check(x, weight, dy, **options):
    compare(rms_norm, reference.rms_norm, (x, weight), (dy,), **options)


def check_sum(x, residual, weight, dy, d_total, **options):
    compare(add_rms_norm, reference.add_rms_norm, (x, residual, weight), (dy, d_total), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_equal_reference(device, dtype, width):
    torch.manual_seed(width)
    x, dy = torch.randn(2, 5, 3, width, dtype=dtype, device=device)[:, :, 0]
    check(x, torch.randn(width, dtype=dtype, device=device), dy)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("width", WIDTHS)
def test_fused_sum_equals_reference(device, dtype, residual_dtype, width):
    torch.manual_seed(width)
    x, dy = torch.randn(2, 5, width, dtype=dtype, device=device)
    residual, d_total = torch.randn(2, 5, width, dtype=residual_dtype, device=device)
    check_sum(x, residual, torch.randn(width, dtype=dtype, device=device), dy, d_total)


OPTIONS = {
    "casting": st.sampled_from(["float32", "llama"]),
    "offset": st.sampled_from([0.0, 1.0]),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
    "weight_dtype": st.sampled_from([torch.float32, torch.float16, None]),
    "seed": st.integers(0, 99),
}


def draw(num_rows, width, seed, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_weight(width, seed, dtype, offset):
    """Return a weight, or None, with a valid offset."""
    if dtype is None:
        return None, {"offset": 0.0}
    return draw(1, width, seed, dtype)[0], {"offset": offset}


@settings(derandomize=True, deadline=None, max_examples=25)
@given(num_rows=st.integers(1, 70), width=ROW_WIDTHS, scale=st.sampled_from([1e-4, 1.0, 1e3]), **OPTIONS)
def test_any_shape_scale_and_options(num_rows, width, scale, casting, offset, dtype, weight_dtype, seed):
    weight, options = draw_weight(width, seed, weight_dtype, offset)
    x, dy = (draw(num_rows, width, seed + i, dtype) for i in (1, 2))
    check(x * scale, weight, dy, casting=casting, **options)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    num_rows=st.integers(1, 70),
    width=ROW_WIDTHS,
    residual_dtype=st.sampled_from([torch.float32, torch.float16]),
    used=st.sampled_from(["both", "y", "total"]),
    **OPTIONS,
)
def test_any_fused_sum(num_rows, width, residual_dtype, used, casting, offset, dtype, weight_dtype, seed):
    weight, options = draw_weight(width, seed, weight_dtype, offset)
    x, dy = (draw(num_rows, width, seed + i, dtype) for i in (1, 2))
    residual, d_total = (draw(num_rows, width, seed + i, residual_dtype) for i in (3, 4))
    dy, d_total = (None if used == "total" else dy), (None if used == "y" else d_total)
    check_sum(x, residual, weight, dy, d_total, casting=casting, **options)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_rows_of_few_elements(device, width):
    torch.manual_seed(0)
    x, residual, dy, d_total = 1 + torch.rand(4, 5, width, device=device)
    weight = torch.randn(width, device=device)
    check(x, weight, dy)
    check_sum(x, residual, weight, dy, d_total)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_weight_and_input_of_different_dtypes(device, weight_dtype):
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
    x, dy, residual, d_total = (view(torch.randn(20, 48, device=device)) for _ in range(4))
    weight = torch.randn(x.shape[-1], device=device)
    check(x, weight, dy)
    check_sum(x, residual, weight, dy, d_total)


def test_expanded_upstream_gradients(device):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 24, device=device)
    one = torch.ones((), device=device).expand(5, 24)
    check_sum(x, residual, torch.randn(24, device=device), one, one)


def test_strided_weight(device):
    torch.manual_seed(0)
    check(torch.randn(3, 10, device=device), torch.randn(20, device=device)[::2], torch.randn(3, 10, device=device))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8)])
def test_leading_shapes(device, shape):
    x, residual, dy, d_total = (torch.randn(shape, device=device) for _ in range(4))
    check(x, torch.randn(8, device=device), dy)
    check_sum(x, residual, torch.randn(8, device=device), dy, d_total)


@pytest.mark.parametrize("width", [3, 40_000])
def test_no_rows(device, width):
    empty = torch.randn(0, width, device=device)
    check_sum(empty, empty, torch.randn(width, device=device), empty, empty)


def test_rows_of_zeros(device):
    check(torch.zeros(4, 16, device=device), torch.ones(16, device=device), torch.randn(4, 16, device=device))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
def test_computes_only_needed_gradients(device, wanted, residual_dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(4, 16), torch.randn(4, 16, dtype=residual_dtype), torch.randn(16)]

    def grads(function):
        leaves = [t.to(device).requires_grad_(is_wanted) for t, is_wanted in zip(tensors, wanted, strict=True)]
        y, total = function(*leaves)
        (y.sin().sum() + total.float().sin().sum()).backward()
        return [t.grad for t in leaves]

    with use_backend("triton"), poisoned_memory():
        actual = grads(add_rms_norm)
    for is_wanted, a, b in zip(wanted, actual, grads(reference.add_rms_norm), strict=True):
        assert (a is not None) == is_wanted
        if is_wanted:
            torch.testing.assert_close(a, b)


def test_unused_result_launches_no_backward_kernel(device):
    x, residual = torch.randn(2, 4, 16, device=device, requires_grad=True)
    with use_backend("triton"), profile() as profiler:
        _, total = add_rms_norm(x, residual)
        torch.autograd.grad(total.sum(), (x, residual))
    assert not [event.key for event in profiler.key_averages() if "rms_norm_backward" in event.key]


def test_shared_gradient_of_both_addends_can_be_accumulated(device):
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    with use_backend("triton"):
        for _ in range(2):
            sum(t.sum() for t in add_rms_norm(x, residual)).backward()
    y, total = reference.add_rms_norm(x, residual)
    (once,) = torch.autograd.grad(y.sum() + total.sum(), x)
    torch.testing.assert_close(x.grad, 2 * once)
    torch.testing.assert_close(residual.grad, 2 * once)


def test_sum_is_rounded_to_the_residual_dtype_before_normalization(device):
    torch.manual_seed(0)
    x = torch.randn(5, 33, device=device)
    residual = torch.randn(5, 33, device=device, dtype=torch.float16)
    with use_backend("triton"):
        y, total = add_rms_norm(x, residual)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(total, (x + residual.float()).half(), rtol=0, atol=0)
    torch.testing.assert_close(y, reference.rms_norm(total.float()))


def test_llama_casting_rounds_before_the_weight(device):
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64, device=device).half(), torch.randn(64, device=device)
    normalised = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)).half()
    expected = (weight * normalised).half()  # the product in float32, as PyTorch promotes it
    assert torch.equal(reference.rms_norm(x, weight, EPS, casting="llama"), expected)
    with use_backend("triton"):
        actual = rms_norm(x, weight, EPS, casting="llama")
        assert not torch.equal(rms_norm(x, weight, EPS), expected)
    # Another order of summation may change a few roundings.
    assert (actual == expected).float().mean() > 0.99


def test_gemma_offset_is_one_plus_the_weight(device):
    x, weight = torch.randn(4, 16, device=device), torch.randn(16, device=device)
    with use_backend("triton"):
        torch.testing.assert_close(rms_norm(x, weight, offset=1.0), rms_norm(x, 1 + weight))
        torch.testing.assert_close(rms_norm(x), torch.nn.functional.rms_norm(x, (16,), eps=1e-5))


@pytest.mark.parametrize("options", [{}, {"casting": "llama"}, {"offset": 1.0}])
def test_reference_passes_gradcheck(options):
    x, residual, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (5,)))
    assert torch.autograd.gradcheck(partial(reference.rms_norm, **options), (x, weight))
    assert torch.autograd.gradcheck(partial(reference.add_rms_norm, **options), (x, residual, weight))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 8), torch.ones(7)), {}, r"weight has shape \(7,\).*\(8,\)"),
        ((torch.ones(()),), {}, r"x has shape \(\).*\(\.\.\., D\)"),
        ((torch.ones(2, 0),), {}, r"x has shape \(2, 0\)"),
        ((torch.ones(2, 8),), {"casting": "gemma"}, "'gemma'.*'float32' or 'llama'"),
        ((torch.ones(2, 8),), {"offset": 1.0}, r"offset is 1\.0.*expected 0\.0"),
        ((torch.ones(2, 8),), {"eps": None}, "eps is None: expected a finite number, 0 or more"),
        ((torch.ones(2, 8),), {"eps": -1e-5}, "eps is -1e-05"),
        ((torch.ones(2, 8), torch.ones(8)), {"offset": True}, "offset is True: expected a finite number"),
        ((torch.ones(2, 8), torch.ones(8, device="meta")), {}, "weight is on meta: expected c"),
        ((torch.ones(2, 8, dtype=torch.int64),), {}, "x has dtype torch.int64: expected .*torch.float64"),
        ((torch.ones(2, 8), torch.ones(8, dtype=torch.int32)), {}, "weight has dtype torch.int32"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bad_arguments_raise(device, arguments, options, message, backend):
    arguments = [t if t.is_meta else t.to(device) for t in arguments]
    with use_backend(backend), pytest.raises(ValueError, match=message):
        rms_norm(*arguments, **options)


def test_float64_runs_reference(device):
    x, residual, weight = torch.randn(2, 8, device=device), torch.randn(2, 8, device=device), torch.randn(8, device=device)
    with use_backend("triton"):
        for inputs in ((x.double(), weight), (x, weight.double())):
            assert torch.equal(rms_norm(*inputs), reference.rms_norm(*inputs))
        for actual, expected in zip(
            add_rms_norm(x, residual.double(), weight), reference.add_rms_norm(x, residual.double(), weight), strict=True
        ):
            assert torch.equal(actual, expected)
            assert actual.dtype == expected.dtype


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.ones(8), r"residual has shape \(8,\).*\(2, 8\)"),
        (torch.ones(2, 8, dtype=torch.int64), "residual has dtype torch.int64"),
        (torch.ones(2, 8, device="meta"), "residual is on meta"),
    ],
)
def test_bad_residual_raises(device, backend, residual, message):
    residual = residual if residual.is_meta else residual.to(device)
    with use_backend(backend), pytest.raises(ValueError, match=message):
        add_rms_norm(torch.ones(2, 8, device=device), residual)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_gives_float32_like_pytorch(backend):
    x, weight = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16), torch.randn(64, device="cuda")
    with use_backend(backend), torch.autocast("cuda", torch.bfloat16):
        y = rms_norm(x, weight)
        # PyTorch 2.13 casts x to float32 under autocast, 2.11 does not.
        expected = torch.nn.functional.rms_norm(x.float(), (64,), weight, 1e-5)
        fused, total = add_rms_norm(x, x, weight)
    assert y.dtype == expected.dtype == torch.float32
    assert fused.dtype == total.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(fused, torch.nn.functional.rms_norm(total.float(), (64,), weight, 1e-5).bfloat16())


def test_float32_result_of_half_input_has_half_gradients(device):
    # The dtypes that autocast requests, on any device.
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 40, device=device)
    x, weight = x.half().requires_grad_(), torch.randn(40, device=device)
    y, _, _ = torch.ops.tilewright.rms_norm(x, None, weight, EPS, 0.0, False, torch.float32)
    expected = reference.rms_norm(x.float(), weight, EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)))
