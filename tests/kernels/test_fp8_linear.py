import math

import pytest
import torch

from tilewright.kernels import AmaxHistory, fp8_linear, use_backend
from tilewright.kernels import fp8_reference as reference
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.fp8_kernels import quantise

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def scaled_rows(rows, width, dtype=torch.float32, device="cpu"):
    """Return random rows with scales from 1e-6 to 100, and one row of zeros."""
    torch.manual_seed(0)
    x = torch.randn(rows, width) * torch.logspace(-6, 2, rows)[:, None]
    x[3] = 0
    return x.to(device, dtype)


def equal(a, b):
    """Whether tensors of any dtype are equal; NaN equals NaN."""
    return torch.equal(a.float().nan_to_num(-1.0), b.float().nan_to_num(-1.0))


@needs_triton
@pytest.mark.parametrize("eight", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("rowwise", [False, True])
def test_kernels_round_like_reference(eight, dtype, bad, rowwise, device):
    x = scaled_rows(80, 144, dtype, device)
    x[5, 7] = bad
    actual = quantise(x, eight, rowwise)
    rows, inverses = reference.quantise(x, eight, 1 if rowwise else None)
    columns, column_inverses = reference.quantise(x, eight, 0 if rowwise else None)
    assert equal(actual.rows, rows)
    assert equal(actual.columns, columns.T)
    assert equal(actual.row_inverses, inverses)
    assert equal(actual.column_inverses, column_inverses.reshape(actual.column_inverses.shape))
    assert inverses.isnan().sum() == (bad != 0)


@needs_triton
@pytest.mark.parametrize("known", [0.0, 0.5, 1000.0])
def test_known_magnitude_replaces_the_tensors_own(known, device):
    x, known, seen = scaled_rows(48, 80, device=device), torch.tensor(known, device=device), torch.zeros((), device=device)
    actual = quantise(x, torch.float8_e4m3fn, False, known, seen)
    expected, inverse = reference.quantise(x, torch.float8_e4m3fn, None, known)
    assert equal(actual.rows, expected)
    assert torch.equal(actual.row_inverses, inverse)
    assert seen == x.abs().max()
    torch.testing.assert_close(inverse, (known if known > 0 else seen) / 448)
    assert actual.rows.float().abs().max() <= 448


@pytest.mark.parametrize("eight", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_rounding_error_is_half_a_unit(eight, dim):
    x = torch.randn(64, 96)
    q, inverse = reference.quantise(x, eight, dim)
    digit, least = torch.finfo(eight).eps, torch.finfo(eight).smallest_normal * torch.finfo(eight).eps
    assert ((q.float() * inverse - x).abs() <= 0.5001 * torch.maximum(digit * x.abs(), least * inverse)).all()
    if dim is None:
        assert q.float().abs().max() == torch.finfo(eight).max
    else:
        assert torch.frexp(inverse)[0].eq(0.5).all()


@pytest.mark.parametrize("eight", DTYPES, ids=str)
def test_reference_product_matches_scaled_mm(eight):
    (a, a_inverse), (b, b_inverse) = (
        reference.quantise(scaled_rows(32, 64), eight),
        reference.quantise(torch.randn(48, 64), DTYPES[0]),
    )
    expected = torch._scaled_mm(a, b.T, a_inverse, b_inverse, out_dtype=torch.float32)
    torch.testing.assert_close(
        reference.scaled_product(a, b, a_inverse, b_inverse, torch.float32), expected, rtol=1e-4, atol=1e-3
    )


def step(x, weight, dy, **options):
    """Return y and both gradients."""
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    y = fp8_linear(x, weight, **options)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def operands(device="cpu"):
    torch.manual_seed(0)
    return (torch.randn(size, device=device) for size in ((2, 16, 48), (32, 48), (2, 16, 32)))


@pytest.mark.parametrize("rowwise", [False, True])
def test_results_and_gradients_are_products_of_rounded_operands(rowwise):
    x, weight, dy = operands()
    y, dx, dweight = step(x, weight, dy, rowwise=rowwise)

    def rounded(t, dim, eight=DTYPES[0]):
        q, inverse = reference.quantise(t.flatten(0, -2), eight, dim if rowwise else None)
        return (q.double() * inverse.double()).float()

    gradient = DTYPES[0] if rowwise else DTYPES[1]
    torch.testing.assert_close(y.flatten(0, 1), rounded(x, 1) @ rounded(weight, 1).T)
    torch.testing.assert_close(dx.flatten(0, 1), rounded(dy, 1, gradient) @ rounded(weight, 0))
    torch.testing.assert_close(dweight, rounded(dy, 0, gradient).T @ rounded(x, 0))
    exact = (x @ weight.T, dy @ weight, dy.flatten(0, 1).T @ x.flatten(0, 1))
    for own, right in zip((y, dx, dweight), exact, strict=True):
        assert (own - right).norm() < 0.1 * right.norm()


@needs_triton
@pytest.mark.parametrize("form", ["current", "rowwise", "delayed", "delayed later"])
def test_kernels_equal_reference(form, device):
    results, seen = [], []
    for backend in ("triton", "reference"):
        known = torch.full((3,), 2.0 if form == "delayed later" else 0.0, device=device)
        history = AmaxHistory(known, torch.zeros(2, device=device), torch.zeros(1, device=device))
        options = {"rowwise": form == "rowwise", "history": history if "delayed" in form else None}
        with use_backend(backend):
            results.append(step(*operands(device), **options))
        seen.append(torch.cat([history.seen, history.seen_gradient]))
    torch.testing.assert_close(*results, rtol=1e-2 if device.type == "cuda" else 1e-5, atol=1e-4)
    assert torch.equal(*seen)
    assert (seen[0] > 0).all() == ("delayed" in form)


def test_matches_torchao_emulation():
    config = pytest.importorskip("torchao.float8")
    from torchao.float8.float8_linear import Float8Linear

    for name in ("tensorwise", "rowwise"):
        recipe = config.Float8LinearConfig.from_recipe_name(name)
        object.__setattr__(recipe, "emulate", True)
        x, weight, dy = operands()
        theirs = torch.nn.Linear(48, 32, bias=False)
        theirs.weight.data.copy_(weight)
        theirs = Float8Linear.from_float(theirs, recipe)
        y = theirs(x.requires_grad_())
        y.backward(dy)
        own = step(x.detach(), weight, dy, rowwise=name == "rowwise")
        torch.testing.assert_close(own, (y.detach(), x.grad, theirs.weight.grad))


@pytest.mark.parametrize(
    ("shapes", "options", "named"),
    [
        (((24, 32), (16, 32)), {}, "x has 24 rows of 32, weight 16 rows: expected multiples of 16"),
        (((16, 40), (16, 40)), {}, "rows of 40"),
        (((16, 32), (24, 32)), {}, "weight 24 rows"),
        (((16, 32), (16, 48)), {}, r"expected \(\.\.\., K\) and \(N, K\)"),
        (((16, 65536), (16, 65536)), {"rowwise": True}, "at most 32768"),
        (((16, 32), (16, 32)), {"rowwise": True, "history": AmaxHistory(*torch.zeros(3, 3))}, "history is given with rowwise"),
    ],
)
def test_bad_arguments_raise(shapes, options, named):
    with pytest.raises(ValueError, match=named):
        fp8_linear(*(torch.zeros(shape) for shape in shapes), **options)
    with pytest.raises(ValueError, match="expected equal dtypes"):
        fp8_linear(torch.zeros(16, 16), torch.zeros(16, 16).half())
