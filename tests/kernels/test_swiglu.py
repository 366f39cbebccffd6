import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import reference, swiglu, use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.gated import gated_launch_config

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    # exp(-gate) overflows to infinity on purpose; only the interpreter's NumPy warns.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# 1, prime, a power of two, odd and wider than a block, and slightly wider than a block.
WIDTHS = [1, 127, 1024, 2049, 4100]


def gradients(function, inputs, dy):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


def check(inputs, dy):
    with use_backend("triton"), poisoned_memory():
        actual = gradients(swiglu, inputs, dy)
    expected = gradients(reference.swiglu, inputs, dy)
    exact = gradients(reference.swiglu, [x.double() for x in inputs], dy.double())
    names = ("y", "dgate", "dup") if len(inputs) == 2 else ("y", "dgate_up")
    for what, *tensors in zip(names, actual, expected, exact, strict=True):
        assert_accurate(*tensors, what=what)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_backward_equal_reference(device, dtype, width, packed):
    torch.manual_seed(width)
    gate_up = 3 * torch.randn(2, 3, 2 * width, dtype=dtype, device=device)
    check([gate_up] if packed else gate_up.chunk(2, dim=-1), torch.randn(2, 3, width, dtype=dtype, device=device))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    num_rows=st.integers(1, 70),
    width=st.integers(1, 300),
    form=st.sampled_from(["contiguous", "halves", "packed"]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape_and_scale(num_rows, width, form, seed, scale):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    gate_up, dy = (torch.randn(num_rows, n * width, generator=generator).to(device) for n in (2, 1))
    gate_up = gate_up * scale
    halves = gate_up.chunk(2, dim=-1)
    check({"contiguous": [x.contiguous() for x in halves], "halves": halves, "packed": [gate_up]}[form], dy)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, ::2], id="every other column"),
        pytest.param(lambda t: t[::2], id="every other row"),
        pytest.param(lambda t: t[:, 3:41], id="slice of the columns"),
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[:1].expand(20, -1), id="expanded rows"),
        pytest.param(lambda t: t[:, :1].expand(-1, 48), id="expanded columns"),
        pytest.param(lambda t: t.unflatten(0, (4, 5)).transpose(0, 1), id="transposed leading dimensions"),
    ],
)
def test_strided_inputs_and_gradients(device, view):
    torch.manual_seed(0)
    gate, up, dy = (view(torch.randn(20, 48, device=device)) for _ in range(3))
    check([gate, up], dy)
    check([gate, up.contiguous()], dy.contiguous())
    check([gate], dy[..., : gate.shape[-1] // 2])


def test_expanded_upstream_gradient(device):
    gate, up = torch.randn(2, 5, 33, device=device)
    check([gate, up], torch.ones((), device=device).expand(5, 33))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8)])
def test_leading_shapes_and_empty_inputs(device, shape):
    torch.manual_seed(0)
    dy = torch.randn(shape, device=device)
    check([torch.randn(shape, device=device), torch.randn(shape, device=device)], dy)
    check([torch.randn((*shape[:-1], 2 * shape[-1]), device=device)], dy)


def test_scalars(device):
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, device=device)
    check([gate, up], dy)


@pytest.mark.parametrize(
    ("gate_dtype", "up_dtype", "expected"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        pytest.param(torch.bfloat16, torch.float16, torch.float32, marks=pytest.mark.gpu),
    ],
)
def test_mixed_dtypes_are_promoted_like_pytorch(device, gate_dtype, up_dtype, expected):
    gate, up = torch.randn(4, 20, device=device).to(gate_dtype), torch.randn(4, 20, device=device).to(up_dtype)
    check([gate, up], torch.randn(4, 20, device=device))
    with use_backend("triton"):
        assert swiglu(gate, up).dtype == (gate * up).dtype == expected


def test_large_gates_saturate(device):
    gate = torch.tensor([-1e4, -200.0, -100.0, 0.0, 100.0, 200.0, 1e4], device=device)
    check([gate, torch.ones_like(gate)], torch.ones_like(gate))


def test_packed_gradient_is_contiguous_and_only_inputs_are_saved(device):
    saved = []
    gate_up = torch.randn(4, 64, device=device, requires_grad=True)
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = swiglu(gate_up)
        (gradient,) = torch.autograd.grad(y.sum(), gate_up)
    assert [t.data_ptr() for t in saved] == [gate_up.data_ptr()]
    assert gradient.is_contiguous()


@pytest.mark.parametrize("width", [1, 100, 1024, 3072, 6400, 11008, 14336, 2**31])
@pytest.mark.parametrize("element_size", [2, 4])
def test_blocks_fit_the_rows(width, element_size):
    config = gated_launch_config(1 << 20, width, element_size)
    block_rows, block_width = config["BLOCK_ROWS"], config["BLOCK_WIDTH"]
    assert block_rows * block_width * element_size == 8192
    idle = -(-width // block_width) * block_width / width - 1
    assert idle <= 1 / 16 or block_width <= 1024


def test_reference_passes_gradcheck():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(reference.swiglu, (gate, up))
    assert torch.autograd.gradcheck(reference.swiglu, (gate,))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 8), torch.ones(2, 7)), r"up has shape \(2, 7\).*\(2, 8\)"),
        ((torch.ones(2, 7),), r"gate has shape \(2, 7\).*even"),
        ((torch.tensor(1.0),), r"gate has shape \(\).*even"),
        ((torch.ones(2, 0), torch.ones(2, 0)), r"gate has shape \(2, 0\).*1 or more"),
        ((torch.ones(2, 0),), r"gate has shape \(2, 0\).*1 or more"),
        ((torch.ones(2), torch.tensor([1, 2])), r"up has dtype torch\.int64.*torch\.float32"),
        ((torch.ones(2), torch.ones(2, device="meta")), "up is on meta.*c"),
    ],
)
def test_bad_arguments_raise(device, backend, arguments, message):
    arguments = [t if t.is_meta else t.to(device) for t in arguments]
    with use_backend(backend), pytest.raises(ValueError, match=message):
        swiglu(*arguments)


@pytest.mark.parametrize("layout", ["contiguous", "halves", "packed"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_computes_only_needed_gradients(device, layout, wanted):
    torch.manual_seed(0)
    halves = torch.randn(4, 66, device=device).chunk(2, dim=-1)
    inputs = (
        [torch.cat(halves, dim=-1)] if layout == "packed" else [x.contiguous() if layout == "contiguous" else x for x in halves]
    )

    def grads(function):
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(inputs, wanted, strict=False)]
        if any(x.requires_grad for x in leaves):
            function(*leaves).sin().sum().backward()
        return [x.grad for x in leaves]

    with use_backend("triton"), poisoned_memory():
        actual = grads(swiglu)
    for is_wanted, a, b in zip(wanted, actual, grads(reference.swiglu), strict=False):
        assert (a is not None) == (b is not None) == is_wanted
        if is_wanted:
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_autocast_keeps_dtypes_like_pytorch():
    for dtype in (torch.float32, torch.float16):
        gate, up = torch.randn(2, 4, 64, device="cuda", dtype=dtype)
        with torch.autocast("cuda", torch.bfloat16):
            assert swiglu(gate, up).dtype == (torch.nn.functional.silu(gate) * up).dtype == dtype
