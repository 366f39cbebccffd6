import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BACKENDS, EVERY_OPTION, draw, loss_and_gradient

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import reference, use_backend
from tilewright.kernels.cross_entropy import MAX_BLOCK, CrossEntropyOutput, cross_entropy
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    # NumPy, which runs Triton's interpreter, warns about log(0) and inf - inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]

# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# 1, odd, prime, a power of two, exactly one block, one column more, and several blocks with a partial one.
VOCABULARIES = [1, 7, 127, 1024, MAX_BLOCK, MAX_BLOCK + 1, 2 * MAX_BLOCK + 4001]


def check(logits, targets, dloss=None, dlse=None, **options):
    with use_backend("triton"), poisoned_memory():
        actual = loss_and_gradient(cross_entropy, logits, targets, dloss, dlse, **options)
    expected = loss_and_gradient(reference.cross_entropy, logits, targets, dloss, dlse, **options)
    exact = loss_and_gradient(reference.cross_entropy, logits.double(), targets, dloss, dlse, **options)
    slack = 0.0
    if options.get("softcap") is not None and logits.numel() > 0:
        # The kernel's tanh is accurate to a few units in the last place (test_shared.py), PyTorch's to half a unit.
        slack = 4 * torch.finfo(torch.float32).eps * min(options["softcap"], logits.abs().max().item())
    for what, *tensors in zip((*CrossEntropyOutput._fields, "dlogits"), actual, expected, exact, strict=True):
        if tensors[0] is not None:
            assert_accurate(*(t.float() if what == "predictions" else t for t in tensors), what=what, slack=slack)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_loss_and_gradient_equal_reference(device, dtype, vocabulary, options):
    check(*draw((2, 3), vocabulary, device, dtype), **options)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    num_rows=st.integers(1, 9),
    vocabulary=st.integers(1, 300),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
    weighted=st.booleans(),
    lse_trains=st.booleans(),
    return_predictions=st.booleans(),
    return_z_loss=st.booleans(),
)
def test_any_shape_and_options(num_rows, vocabulary, scale, weighted, lse_trains, **options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, targets = draw((num_rows,), vocabulary, device, scale=scale)
    class_weights = torch.rand(vocabulary, device=device) + 0.1 if weighted else None
    dlse = torch.randn(num_rows, device=device) if lse_trains else None
    check(logits, targets, dlse=dlse, class_weights=class_weights, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_results_and_options_together(device, dtype):
    vocabulary = MAX_BLOCK + 1001
    logits, targets = draw((2, 3), vocabulary, device, dtype)
    flags = {"return_predictions": True, "return_z_loss": True}
    weights = torch.rand(vocabulary, device=device).to(dtype)
    check(logits, targets, dlse=torch.randn(3, 2, device=device).T, class_weights=weights, **flags, **EVERY_OPTION)
    check(logits, targets, dlse=torch.randn(1, 1, device=device).expand(2, 3), **flags, reduction="none")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_upstream_gradient_per_row(device, dtype):
    logits, targets = draw((3, 4), 50, device)
    dloss = torch.randn(4, 3, device=device).T
    check(logits, targets.to(dtype), dloss, reduction="none", **EVERY_OPTION)
    check(logits, targets.to(dtype), dloss[:1].expand(3, 4), reduction="none")


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, :-1], id="all but the last position"),
        pytest.param(lambda t: t[:, 1::2], id="every other row"),
        pytest.param(lambda t: t[..., 3:40], id="slice of the vocabulary"),
        pytest.param(lambda t: t[..., ::2], id="every other column"),
        pytest.param(lambda t: t.transpose(1, 2), id="vocabulary first"),
        pytest.param(lambda t: t[:1, :1].expand(3, 2, -1), id="expanded rows"),
        pytest.param(lambda t: t.transpose(0, 1), id="transposed leading dimensions"),
        pytest.param(lambda t: t.unflatten(0, (2, 2)).transpose(0, 2), id="four dimensions transposed"),
        pytest.param(lambda t: t[0, 0], id="one row"),
    ],
)
def test_strided_logits(device, view):
    logits = view(torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0)).to(device))
    targets = torch.arange(logits[..., 0].numel(), device=device).view(logits.shape[:-1]) % logits.shape[-1]
    check(logits, targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, :-1], id="all but the last position"),
        pytest.param(lambda t: t[:, :, 3:], id="all but the first columns"),
        pytest.param(lambda t: t[1:, 1], id="one position"),
        pytest.param(lambda t: t.transpose(0, 1), id="transposed leading dimensions"),
    ],
)
def test_rows_not_aligned_to_vectors(device, view, dtype):
    # The first and last columns load one by one, the others as vectors. The rows begin at every offset within a vector.
    width = 2 * MAX_BLOCK + 5
    logits = view(draw((3, 4), width, device, dtype)[0])
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=device)
    targets.view(-1)[1], targets.view(-1)[-1] = logits.shape[-1] - 1, MAX_BLOCK
    check(logits, targets)


@pytest.mark.parametrize("vocabulary", [MAX_BLOCK + 3, 2 * MAX_BLOCK - 1])
def test_inplace_gradients_of_rows_not_aligned_to_vectors(device, vocabulary):
    logits, targets = draw((9,), vocabulary, device)
    around = torch.full((11 * vocabulary,), 7.0, device=device)
    with use_backend("triton"):
        expected = torch.autograd.grad(cross_entropy(logits.requires_grad_(), targets), logits)[0]
        buffer = around.clone()
        inside = buffer[vocabulary : 10 * vocabulary].view(9, vocabulary).copy_(logits.detach()).requires_grad_()
        cross_entropy(inside, targets, inplace_backward=True).backward()
    assert torch.equal(inside.detach(), expected)
    assert torch.equal(buffer[:vocabulary], around[:vocabulary])
    assert torch.equal(buffer[10 * vocabulary :], around[10 * vocabulary :])


def test_strided_targets(device):
    logits, targets = draw((3, 4), 20, device)
    check(logits.transpose(0, 1), targets.T)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 2)])
def test_no_rows(device, shape):
    for reduction in ("none", "mean", "sum"):
        check(torch.randn(*shape, 8, device=device), torch.zeros(shape, dtype=torch.long, device=device), reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_targets_ignored_gives_zero_loss_and_gradient(device, backend):
    logits = torch.full((3, 20), math.nan, device=device)
    with use_backend(backend), poisoned_memory():
        logits.requires_grad_()
        loss = cross_entropy(logits, torch.full((3,), 7, device=device), ignore_index=7, **EVERY_OPTION)
        loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_huge_equal_and_infinite_logits_match_pytorch(device):
    inf = math.inf
    rows = [[1e4, -1e4, 0, 3], [2, 2, 2, 2], [-inf, -inf, 0, 1], [0, -inf, -inf, -inf], [-inf, 5, 1, 1], [-inf] * 4]
    logits = torch.tensor(rows, device=device)
    targets = torch.tensor([1, 3, 3, 0, 0, 1], device=device)
    with use_backend("triton"):
        logits.requires_grad_()
        losses = cross_entropy(logits, targets, reduction="none")
        (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert losses[4] == inf
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(dlogits, torch.autograd.grad(expected.sum(), logits)[0], equal_nan=True)


@pytest.mark.parametrize("target", [8, -1, 2**40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_target_outside_vocabulary_gives_nan_in_its_row_only(device, backend, target):
    logits = torch.randn(2, 8, device=device, requires_grad=True)
    with use_backend(backend):
        losses = cross_entropy(logits, torch.tensor([3, target], device=device), reduction="none")
        losses.sum().backward()
    assert losses.isnan().tolist() == [False, True]
    assert logits.grad is not None
    assert logits.grad.isnan().all(dim=1).tolist() == [False, True]
    assert logits.grad[0].isfinite().all()


def test_gradient_overwrites_logits_only_with_inplace_backward(device):
    weight, targets = torch.randn(20, 4, device=device, requires_grad=True), torch.tensor([[1, 2], [3, -100]], device=device)
    x, seen = torch.randn(2, 2, 4, device=device), {}
    for inplace in (False, True):
        logits = F.linear(x, weight)
        before = logits.detach().clone()
        logits.register_hook(lambda gradient: seen.update(gradient=gradient))
        with use_backend("triton"):
            (seen[inplace],) = torch.autograd.grad(cross_entropy(logits, targets, inplace_backward=inplace), weight)
        assert (seen["gradient"].data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(before, logits) != inplace
    assert torch.equal(seen[False], seen[True])


@pytest.mark.parametrize("view", [lambda t: t[:, :-1], lambda t: t.transpose(1, 2)], ids=["sliced", "transposed"])
def test_inplace_gradient_of_strided_logits(device, view):
    source = view(torch.randn(2, 6, 6, device=device))
    targets = torch.zeros(source.shape[:-1], dtype=torch.long, device=device)
    gradients = []
    for inplace in (False, True):
        logits = source.requires_grad_()
        with use_backend("triton"):
            gradients.append(torch.autograd.grad(cross_entropy(logits * 1, targets, inplace_backward=inplace), logits)[0])
    assert torch.equal(*gradients)


def test_second_backward_after_inplace_backward_raises(device):
    logits = torch.randn(2, 8, device=device, requires_grad=True) * 1
    with use_backend("triton"):
        loss = cross_entropy(logits, torch.tensor([1, 2], device=device), inplace_backward=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_reference_passes_gradcheck():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, -100, 2])
    assert torch.autograd.gradcheck(lambda logits: reference.cross_entropy(logits, targets, **EVERY_OPTION), logits)


def test_opcheck(device):
    logits, targets = torch.randn(2, 3, 8, device=device), torch.randint(0, 8, (2, 3), device=device)
    options = None, None, -100, 0.1, 1e-3, 5.0
    # test_contract.py checks the call without flags, and the backward op that leaves the logits as they are.
    args = logits.clone().requires_grad_(), targets, *options, True, True, True, False
    torch.library.opcheck(torch.ops.tilewright.cross_entropy, args)
    dlosses, row_max, log_sum = torch.randn(2, 3, device=device), logits.amax(-1), logits.logsumexp(-1) - logits.amax(-1)
    args = dlosses, None, logits, targets, row_max, log_sum, *options
    torch.library.opcheck(torch.ops.tilewright.cross_entropy_backward_, args)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_equals_eager(device, inplace):
    logits, targets = draw((4, 3), 40, device)

    def step(logits, targets, **options):
        return cross_entropy(3 * logits, targets, inplace_backward=inplace, **options)

    with use_backend("triton"):
        eager = loss_and_gradient(step, logits, targets, **EVERY_OPTION)
        compiled = loss_and_gradient(torch.compile(step, fullgraph=True), logits, targets, **EVERY_OPTION)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets has shape \(3,\).*\(2,\)"),
        ({"targets": torch.zeros(2)}, "targets has dtype torch.float32"),
        ({"logits": torch.randn(2, 0)}, r"logits has shape \(2, 0\)"),
        ({"logits": torch.tensor(1.0)}, r"logits has shape \(\)"),
        ({"logits": torch.zeros(2, 8, dtype=torch.long)}, "logits has dtype torch.int64"),
        (
            {"targets": torch.zeros(2, dtype=torch.long, device="meta")},
            "targets is on meta: expected .*, the device of logits",
        ),
        ({"class_weights": torch.ones(7)}, r"class_weights has shape \(7,\): expected \(8,\)"),
        ({"class_weights": torch.ones(8, dtype=torch.long)}, "class_weights has dtype torch.int64"),
        ({"class_weights": torch.ones(8, requires_grad=True)}, "class_weights requires a gradient"),
        ({"class_weights": torch.ones(8, device="meta")}, "class_weights is on meta"),
        ({"z_loss": torch.ones(1)}, r"z_loss has shape \(1,\)"),
        ({"z_loss": math.inf}, "z_loss is inf"),
        ({"label_smoothing": math.nan}, "label_smoothing is nan"),
        ({"softcap": math.inf}, "softcap is inf: expected a finite number above 0"),
        ({"softcap": math.nan}, "softcap is nan"),
        ({"ignore_index": 1.5}, "ignore_index is 1.5: expected an integer"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": True}, "softcap is True"),
        ({"label_smoothing": torch.tensor(0.1)}, r"label_smoothing is tensor\(0\.1000\)"),
        ({"z_loss": "1e-4"}, "z_loss is '1e-4'"),
        ({"reduction": "median"}, "reduction is 'median': choose 'none', 'mean' or 'sum'"),
        ({"logits": torch.randn(1, 8).expand(2, 8), "inplace_backward": True}, "inplace_backward is True for expanded"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_raise(device, backend, change, message):
    arguments = {"logits": torch.randn(2, 8, device=device), "targets": torch.tensor([1, 2], device=device)}
    for key, value in change.items():
        is_real = isinstance(value, torch.Tensor) and value.device.type != "meta"
        arguments[key] = value.detach().to(device).requires_grad_(value.requires_grad) if is_real else value
    with use_backend(backend), pytest.raises(ValueError, match=message):
        cross_entropy(**arguments)


def test_float64_runs_reference(device):
    logits, targets = draw((3,), 20, device, torch.float64)
    with use_backend("triton"):
        loss = cross_entropy(logits, targets, **EVERY_OPTION)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, reference.cross_entropy(logits, targets, **EVERY_OPTION))


@pytest.mark.gpu
def test_autocast_gives_float32_like_pytorch():
    logits, targets = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16), torch.randint(0, 64, (4,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits, targets)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.huge
@pytest.mark.parametrize("inplace", [False, True])
def test_more_elements_than_31_bits_can_count(inplace):
    num_rows, vocabulary = 2**13 + 3, 2**18 + 5
    logits = torch.zeros(num_rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[-1, -1] = 4.0
    targets = torch.full((num_rows,), vocabulary - 1, device="cuda")
    logits.requires_grad_()
    losses = cross_entropy(logits, targets, reduction="none", inplace_backward=inplace)
    (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    lse = math.log(vocabulary - 1 + math.exp(4.0))
    assert losses[0].item() == pytest.approx(math.log(vocabulary))
    assert losses[-1].item() == pytest.approx(lse - 4.0)
    assert dlogits[-1, -1].item() == pytest.approx(math.exp(4.0 - lse) - 1, rel=1e-2)
    assert dlogits[-1, 0].item() == pytest.approx(math.exp(-lse), rel=1e-2)


@pytest.mark.gpu
def test_vocabulary_of_a_million():
    check(*draw((3, 5), 1_000_003, torch.device("cuda"), torch.bfloat16), **EVERY_OPTION)
