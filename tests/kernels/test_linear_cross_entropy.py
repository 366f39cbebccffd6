import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BACKENDS, EVERY_OPTION
from torch.utils.flop_counter import FlopCounterMode

from oracle import assert_accurate, poisoned_memory
from tilewright.bench.memory import peak_on_gpu
from tilewright.kernels import cross_entropy, reference, use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.linear_chunks import chunk_shape
from tilewright.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    # NumPy, which runs Triton's interpreter, warns about log(0) in rows that are not read.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]

# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def loss_and_gradients(function, x, weight, targets, dloss=None, dlse=None, bias=None, **options):
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    output = function(*inputs[:2], targets, bias=inputs[2], return_lse=True, return_accuracy=True, **options)
    outputs, gradients = [output.loss], [torch.ones_like(output.loss) if dloss is None else dloss.to(output.loss.dtype)]
    if dlse is not None:
        outputs, gradients = [*outputs, output.lse], [*gradients, dlse.to(output.lse.dtype)]
    gradients = torch.autograd.grad(outputs, [t for t in inputs if t is not None], gradients)
    return *(output.loss.detach(), output.lse.detach(), output.accuracy), *gradients


def check(x, weight, targets, dloss=None, dlse=None, bias=None, **options):
    with use_backend("triton"), poisoned_memory():
        actual = loss_and_gradients(linear_cross_entropy, x, weight, targets, dloss, dlse, bias, **options)
    expected = loss_and_gradients(reference.linear_cross_entropy, x, weight, targets, dloss, dlse, bias, **options)
    wide = None if bias is None else bias.double()
    exact = loss_and_gradients(
        reference.linear_cross_entropy, x.double(), weight.double(), targets, dloss, dlse, wide, **options
    )
    for what, *tensors in zip(("loss", "lse", "accuracy", "dx", "dweight", "dbias"), actual, expected, exact, strict=False):
        if what != "accuracy":  # rounded logits may have another argmax than exact ones
            assert_accurate(*tensors, what=what)


def draw(shape, width, vocabulary, device, dtype=torch.float32, weight_dtype=None):
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(*shape, width, generator=generator), torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(0, vocabulary, shape, generator=generator)
    if targets.numel() > 2:
        targets.view(-1)[1] = -100
    return x.to(device, dtype), (weight / width**0.5).to(device, weight_dtype or dtype), targets.to(device)


def peak_bytes(function):
    """Return the peak bytes of tensors that `function` allocates, including temporaries inside ops."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_equal_reference(device, dtype, options, reduction):
    x, weight, targets = draw((2, 7), 16, 130, device, dtype)
    budget = 4 * 192 * dtype.itemsize  # four chunks, the last one of two rows
    check(x, weight, targets, memory_budget=budget, reduction=reduction, **options)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    num_rows=st.integers(1, 9),
    width=st.integers(1, 20),
    vocabulary=st.integers(1, 200),
    memory_budget=st.sampled_from([1, 2000, 2**20]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    biased=st.booleans(),
    weighted=st.booleans(),
    lse_trains=st.booleans(),
)
def test_any_shape_and_budget(num_rows, width, vocabulary, biased, weighted, lse_trains, **options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = draw((num_rows,), width, vocabulary, device)
    options["bias"] = torch.randn(vocabulary, device=device) if biased else None
    options["class_weights"] = torch.rand(vocabulary, device=device) if weighted else None
    check(*inputs, dlse=torch.randn(num_rows, device=device) if lse_trains else None, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_class_weights_and_lse_gradient(device, dtype, reduction):
    x, weight, targets = draw((2, 7), 16, 130, device, dtype)
    bias, class_weights = torch.randn(130, device=device).to(dtype), torch.rand(130, device=device)
    dlse = torch.randn(7, 2, device=device).T
    options = {"class_weights": class_weights, "reduction": reduction, "memory_budget": 4 * 192 * dtype.itemsize}
    check(x, weight, targets, bias=bias, **options)
    check(x, weight, targets, dlse=dlse, bias=bias, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_equal_linear_then_cross_entropy(device, backend, reduction):
    x, weight, targets = draw((2, 7), 16, 130, device)
    bias, class_weights = torch.randn(100, device=device), torch.rand(100, device=device)
    flags = {"return_lse": True, "return_accuracy": True, "return_predictions": True, "return_z_loss": True}
    options = {"class_weights": class_weights, "reduction": reduction, "z_loss": torch.tensor(0.1, device=device), **flags}
    targets %= 100
    with use_backend(backend), poisoned_memory():
        padded = torch.cat([bias, torch.full((30,), 99.0, device=device)])
        actual = linear_cross_entropy(
            x.requires_grad_(), weight, targets, bias=padded, memory_budget=2000, num_classes=100, **options
        )
        expected = cross_entropy(F.linear(x, weight[:100], bias), targets, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_of_bias_only(device, reduction):
    x, weight, targets = draw((5,), 8, 20, device)
    bias = torch.zeros(20, device=device, requires_grad=True)
    for backend in BACKENDS:
        with use_backend(backend):
            (dbias,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction).sum(), bias)
        expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), targets, reduction=reduction).sum(), bias)[0]
        torch.testing.assert_close(dbias, expected)


def test_unused_lse_adds_no_matrix_product(device):
    x, weight, targets = draw((5,), 8, 20, device)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        output = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets, return_lse=True)
        output.loss.backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 8 * 20


@settings(derandomize=True, deadline=None, max_examples=10)
@given(
    num_classes=st.integers(1, 64),
    memory_budget=st.sampled_from([1, 600, 2**20]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    every_option=st.booleans(),
)
def test_padding_rows_of_weight_are_not_classes(num_classes, memory_budget, reduction, every_option):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, weight, targets = draw((5,), 8, 64, device)
    targets = torch.where(targets < 0, targets, targets % num_classes)
    options = {"reduction": reduction, "memory_budget": memory_budget} | (EVERY_OPTION if every_option else {})
    expected = loss_and_gradients(reference.linear_cross_entropy, x, weight[:num_classes], targets, **options)
    for backend in ("reference", "triton"):
        with use_backend(backend), poisoned_memory():
            *actual, dweight = loss_and_gradients(linear_cross_entropy, x, weight, targets, num_classes=num_classes, **options)
        assert torch.equal(dweight[num_classes:], torch.zeros_like(dweight[num_classes:]))
        for a, b in zip((*actual, dweight[:num_classes]), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("accumulate_in_float32", [True, False])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_weight_and_input_of_different_dtypes(device, dtype, weight_dtype, accumulate_in_float32):
    inputs = draw((10,), 16, 60, device, dtype, weight_dtype)
    with use_backend("triton"):
        actual = loss_and_gradients(
            linear_cross_entropy, *inputs, accumulate_in_float32=accumulate_in_float32, memory_budget=4 * 64 * dtype.itemsize
        )
    exact = loss_and_gradients(reference.linear_cross_entropy, *(t.double() if t.is_floating_point() else t for t in inputs))
    assert [t.dtype for t in actual[3:]] == [dtype, weight_dtype]
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-3, atol=2e-3)


def test_weight_gradient_is_summed_in_float32(device):
    # Each of 64 chunks adds 2^-12 to 1, which float16 rounds away.
    x = torch.full((65, 1), 2.0**-11, dtype=torch.float16, device=device)
    x[0] = 2.0
    weight, targets = torch.zeros(2, 1, device=device), torch.zeros(65, dtype=torch.long, device=device)
    gradients = []
    for accumulate_in_float32 in (True, False):
        with use_backend("triton"):
            weight.requires_grad_().grad = None
            options = {"reduction": "sum", "memory_budget": 1, "accumulate_in_float32": accumulate_in_float32}
            linear_cross_entropy(x, weight, targets, **options).backward()
        assert weight.grad is not None
        gradients.append(weight.grad[1].item())
    assert gradients == [1 + 64 * 2.0**-12, 1.0]


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, :-1], id="all but the last position"),
        pytest.param(lambda t: t[..., ::2], id="every other column"),
        pytest.param(lambda t: t.transpose(0, 1), id="transposed leading dimensions"),
        pytest.param(lambda t: t[:1, :1].expand(3, 2, -1), id="expanded"),
        pytest.param(lambda t: t[0, 0], id="one row"),
    ],
)
def test_strided_inputs(device, view):
    x = view(torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0)).to(device))
    weight = torch.randn(x.shape[-1], 40, generator=torch.Generator().manual_seed(1)).to(device).T
    targets = torch.arange(x[..., 0].numel(), device=device).view(x.shape[:-1])
    check(x, weight, targets, memory_budget=1000)


def test_upstream_gradient_per_row(device):
    x, weight, targets = draw((3, 4), 8, 50, device)
    dloss = torch.randn(4, 3, device=device).T
    check(x, weight, targets.int(), dloss, reduction="none", memory_budget=1000)
    check(x, weight, targets, dloss[:1].expand(3, 4), reduction="none", memory_budget=1000)


def test_no_rows_and_no_counted_rows(device):
    for reduction in ("none", "mean", "sum"):
        check(*draw((3, 0), 8, 20, device), reduction=reduction)
        check(*draw((3,), 8, 20, device)[:2], torch.full((3,), -100, device=device), reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trains", [(True, False), (False, True), (False, False)])
def test_computes_only_needed_gradients(device, trains, reduction):
    x, weight, targets = draw((5,), 8, 20, device)
    x.requires_grad_(trains[0])
    weight.requires_grad_(trains[1])
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
        if any(trains):
            loss.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == trains
    recomputed = any(trains) and reduction == "none"
    assert counter.get_total_flops() == 2 * 5 * 8 * 20 * (1 + sum(trains) + recomputed)


def test_forward_computes_all_three_products(device):
    x, weight, targets = draw((5,), 8, 20, device)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == counter.get_total_flops() == 3 * 2 * 5 * 8 * 20


def test_no_grad_computes_one_product(device):
    x, weight, targets = draw((5,), 8, 20, device)
    weight.requires_grad_()
    with use_backend("triton"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_cross_entropy(x, weight, targets).requires_grad
    assert counter.get_total_flops() == 2 * 5 * 8 * 20


@given(
    num_rows=st.integers(0, 10**6),
    vocabulary=st.integers(1, 10**6),
    itemsize=st.sampled_from([2, 4]),
    budget=st.integers(1, 2**32),
)
@settings(derandomize=True, deadline=None)
def test_chunks_stay_within_the_budget(num_rows, vocabulary, itemsize, budget):
    rows, columns = chunk_shape(num_rows, vocabulary, itemsize, budget)
    assert columns >= vocabulary
    assert rows <= max(num_rows, 1)
    assert rows * columns * itemsize <= budget or rows <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures CPU memory; another test measures GPU memory")
def test_peak_memory_is_budget_plus_gradients():
    num_rows, width, vocabulary = 24, 64, 1024
    budget = 4 * vocabulary * 4
    x, weight, targets = draw((num_rows,), width, vocabulary, torch.device("cpu"))
    dx_bytes, dw_bytes, slack = x.nbytes, weight.nbytes, 16 * 1024

    def peak(x_trains, weight_trains, memory_budget=budget):
        inputs = x.clone().requires_grad_(x_trains), weight.clone().requires_grad_(weight_trains), targets
        with use_backend("triton"):
            if x_trains or weight_trains:
                return peak_bytes(lambda: linear_cross_entropy(*inputs, memory_budget=memory_budget).backward())
            return peak_bytes(lambda: linear_cross_entropy(*inputs, memory_budget=memory_budget))

    assert peak(False, False) <= budget + slack
    # The backward pass holds the saved gradient and the scaled one.
    assert peak(True, False) <= max(budget, dx_bytes) + 2 * dx_bytes + slack < dw_bytes
    assert peak(True, True) <= max(budget, dx_bytes + dw_bytes) + dx_bytes + dw_bytes + slack
    assert peak(False, False, memory_budget=2**30) >= num_rows * vocabulary * 4


def test_autocast_casts_like_a_linear_layer(device):
    x, weight, targets = draw((6,), 16, 40, device)
    gradients = []
    for function in (linear_cross_entropy, reference.linear_cross_entropy):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with use_backend("triton"), torch.autocast(device.type, torch.float16):
            loss = function(x, weight, targets)
        assert loss.dtype == torch.float32
        gradients.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    half = F.linear(x.half(), weight.half())
    torch.testing.assert_close(gradients[0][0], F.cross_entropy(half.float(), targets))


def test_backward_may_run_twice(device):
    x, weight, targets = draw((5,), 8, 20, device)
    with use_backend("triton"):
        loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (x, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_reference_passes_gradcheck():
    x, weight = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.tensor([0, -100, 2])

    def loss(x, weight):
        return reference.linear_cross_entropy(x, weight, targets, memory_budget=16, **EVERY_OPTION)

    assert torch.autograd.gradcheck(loss, (x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(20, 7)}, r"x has shape \(2, 8\) and weight \(20, 7\)"),
        ({"weight": torch.randn(8)}, r"expected \(\.\.\., D\) and \(V, D\)"),
        ({"weight": torch.randn(0, 8)}, "V of 1 or more"),
        ({"x": torch.randn(2, 0), "weight": torch.randn(20, 0)}, "D and V of 1 or more"),
        ({"bias": torch.randn(8)}, r"bias has shape \(8,\): expected \(20,\)"),
        ({"bias": torch.zeros(20, dtype=torch.long)}, "bias has dtype torch.int64"),
        ({"bias": torch.zeros(20, device="meta")}, "bias is on meta"),
        ({"weight": torch.randn(20, 8, device="meta")}, "weight is on meta: expected .*, the device of x"),
        ({"targets": torch.zeros(2, dtype=torch.long, device="meta")}, "targets is on meta"),
        ({"class_weights": torch.ones(20), "num_classes": 19}, r"class_weights has shape \(20,\): expected \(19,\)"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"num_classes": 1.5}, "num_classes is 1.5: expected an integer"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets has shape \(3,\).*\(2,\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.long)}, "x has dtype torch.int64"),
        ({"weight": torch.zeros(20, 8, dtype=torch.long)}, "weight has dtype torch.int64"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"num_classes": 21}, "num_classes is 21: expected an integer, 1 to 20"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"reduction": "median"}, "reduction is 'median': choose 'none', 'mean' or 'sum'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_raise(device, backend, change, message):
    arguments = {"x": torch.randn(2, 8), "weight": torch.randn(20, 8), "targets": torch.tensor([1, 2])} | change
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            arguments[key] = value.to(device)
    with use_backend(backend), pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_float64_runs_reference(device):
    x, weight, targets = draw((3,), 8, 20, device, torch.float64)
    with use_backend("triton"):
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, reference.linear_cross_entropy(x, weight, targets))


@pytest.mark.gpu
@pytest.mark.parametrize("weight_trains", [True, False])
def test_peak_gpu_memory_is_budget_plus_gradients(weight_trains):
    budget = 64 * 2**20
    x, weight, targets = draw((4096,), 256, 50257, torch.device("cuda"), torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_(weight_trains)
    linear_cross_entropy(x[:1], weight, targets[:1])  # allocate the cuBLAS workspace
    peak = peak_on_gpu(lambda: linear_cross_entropy(x, weight, targets, memory_budget=budget).backward(), x.device)
    gradients = 2 * x.nbytes + (3 * weight.nbytes if weight_trains else 0)
    assert peak <= budget + gradients + 2**20
    assert budget + gradients < 4096 * 50257 * 2
