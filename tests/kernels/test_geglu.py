import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import geglu, reference, use_backend
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
FORMS = [(packed, approximate) for packed in (False, True) for approximate in ("tanh", "none")]


def gradients(function, inputs, dy, approximate):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs, approximate=approximate)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


def check(inputs, dy, approximate):
    with use_backend("triton"), poisoned_memory():
        actual = gradients(geglu, inputs, dy, approximate)
    expected = gradients(reference.geglu, inputs, dy, approximate)
    exact = gradients(reference.geglu, [x.double() for x in inputs], dy.double(), approximate)
    names = ("y", "dgate", "dup") if len(inputs) == 2 else ("y", "dgate_up")
    for what, *tensors in zip(names, actual, expected, exact, strict=True):
        # PyTorch's 1 + tanh cancels in float64 too, with an error of 1e-14 that the kernel does not have.
        assert_accurate(*tensors, what=what, slack=1e-12)


@pytest.mark.parametrize(("packed", "approximate"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 127, 1024, 2049])
def test_forward_and_backward_equal_reference(device, dtype, width, packed, approximate):
    torch.manual_seed(width)
    gate_up = 3 * torch.randn(2, 3, 2 * width, dtype=dtype, device=device)
    dy = torch.randn(2, 3, width, dtype=dtype, device=device)
    check([gate_up] if packed else gate_up.chunk(2, dim=-1), dy, approximate)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    num_rows=st.integers(1, 70),
    width=st.integers(1, 300),
    form=st.sampled_from(["contiguous", "halves", "packed"]),
    approximate=st.sampled_from(["tanh", "none"]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape_and_scale(num_rows, width, form, approximate, seed, scale):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    gate_up, dy = (torch.randn(num_rows, n * width, generator=generator).to(device) for n in (2, 1))
    gate_up = gate_up * scale
    halves = gate_up.chunk(2, dim=-1)
    inputs = {"contiguous": [x.contiguous() for x in halves], "halves": halves, "packed": [gate_up]}[form]
    check(inputs, dy, approximate)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_equals_pytorch_gelu_times_up(device, backend, approximate):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 4, 50, device=device)
    expected = F.gelu(gate, approximate=approximate) * up
    with use_backend(backend):
        torch.testing.assert_close(geglu(gate, up, approximate), expected)
        torch.testing.assert_close(geglu(torch.cat((gate, up), dim=-1), approximate=approximate), expected)
        torch.testing.assert_close(geglu(gate, up), F.gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_large_gates_saturate(device, approximate):
    gate = torch.tensor([-1e4, -200.0, -12.0, -5.0, 0.0, 5.0, 100.0, 1e4], device=device)
    check([gate, torch.ones_like(gate)], torch.ones_like(gate), approximate)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_negative_tails_are_accurate(device, approximate):
    # Here PyTorch's 1 + tanh and 1 + erf cancel.
    gate = torch.linspace(-4.0, -2.0, 33, device=device)
    up = torch.ones_like(gate)
    exact = reference.geglu(gate.double(), up.double(), approximate)
    with use_backend("triton"):
        error = (geglu(gate, up, approximate).double() / exact - 1).abs().max().item()
    expected = (reference.geglu(gate, up, approximate).double() / exact - 1).abs().max().item()
    assert error <= (1e-6 if approximate == "tanh" else 2 * expected)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, ::2], id="every other column"),
        pytest.param(lambda t: t[:, 3:41], id="slice of the columns"),
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[:1].expand(20, -1), id="expanded rows"),
        pytest.param(lambda t: t.unflatten(0, (4, 5)).transpose(0, 1), id="transposed leading dimensions"),
    ],
)
def test_strided_inputs_and_gradients(device, view):
    torch.manual_seed(0)
    gate, up, dy = (view(torch.randn(20, 48, device=device)) for _ in range(3))
    check([gate, up], dy, "tanh")
    check([gate], dy[..., : gate.shape[-1] // 2], "none")


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8), ()])
def test_leading_shapes(device, shape):
    torch.manual_seed(0)
    dy = torch.randn(shape, device=device)
    check([torch.randn(shape, device=device), torch.randn(shape, device=device)], dy, "tanh")


@pytest.mark.parametrize(("gate_dtype", "up_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes_are_promoted_like_pytorch(device, gate_dtype, up_dtype):
    gate, up = torch.randn(4, 20, device=device).to(gate_dtype), torch.randn(4, 20, device=device).to(up_dtype)
    check([gate, up], torch.randn(4, 20, device=device), "tanh")
    with use_backend("triton"):
        assert geglu(gate, up).dtype == (gate * up).dtype


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_computes_only_needed_gradients(device, approximate, wanted):
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 33, device=device)

    def grads(function):
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(inputs, wanted, strict=True)]
        function(*leaves, approximate).sin().sum().backward()
        return [x.grad for x in leaves]

    with use_backend("triton"), poisoned_memory():
        actual = grads(geglu)
    for is_wanted, a, b in zip(wanted, actual, grads(reference.geglu), strict=True):
        assert (a is not None) == is_wanted
        if is_wanted:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_reference_passes_gradcheck(approximate):
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *inputs: reference.geglu(*inputs, approximate=approximate), (gate, up))
    assert torch.autograd.gradcheck(lambda gate: reference.geglu(gate, approximate=approximate), (gate,))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 8), torch.ones(2, 7)), r"up has shape \(2, 7\).*\(2, 8\)"),
        ((torch.ones(2, 7),), r"gate has shape \(2, 7\).*even"),
        ((torch.ones(2, 0), torch.ones(2, 0)), r"gate has shape \(2, 0\).*1 or more"),
        ((torch.ones(2, dtype=torch.int32),), r"gate has dtype torch\.int32.*torch\.float32"),
        ((torch.ones(2), torch.ones(2, device="meta")), "up is on meta.*c"),
        ((torch.ones(2, 8), None, "sigmoid"), "approximate is 'sigmoid': choose 'none' or 'tanh'"),
    ],
)
def test_bad_arguments_raise(device, backend, arguments, message):
    arguments = [x.to(device) if isinstance(x, torch.Tensor) and not x.is_meta else x for x in arguments]
    with use_backend(backend), pytest.raises(ValueError, match=message):
        geglu(*arguments)


def test_float64_runs_reference(device):
    gate, up = torch.randn(2, 8, dtype=torch.float64, device=device), torch.randn(2, 8, device=device)
    with use_backend("triton"):
        assert torch.equal(geglu(gate, up, "none"), reference.geglu(gate, up, "none"))
