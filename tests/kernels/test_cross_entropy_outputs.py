"""Outputs and options of cross-entropy: lse, accuracy, predictions, z-loss, class weights, schedules."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BACKENDS, EVERY_OPTION, draw, loss_and_gradient

from oracle import poisoned_memory
from tilewright.kernels import use_backend
from tilewright.kernels.cross_entropy import MAX_BLOCK, CrossEntropyOutput, cross_entropy
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    # NumPy, which runs Triton's interpreter, warns about log(0) and inf - inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


def test_ignored_row_has_correct_lse(device):
    logits = torch.randn(1, 20, device=device)
    with use_backend("triton"):
        output = cross_entropy(logits, torch.tensor([-100], device=device), return_lse=True)
    torch.testing.assert_close(output.lse, logits.logsumexp(-1))


def test_accuracy_counts_the_first_argmax_of_counted_rows(device):
    logits = torch.tensor([[0.0, 1, 1], [0, 1, 1], [5, 1, 1], [0, 0, 9]], device=device)
    targets = torch.tensor([1, 2, 0, -100], device=device)
    with use_backend("triton"):
        output = cross_entropy(logits, targets, return_accuracy=True)
    assert isinstance(output, CrossEntropyOutput)
    assert output.lse is None
    assert output.accuracy.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_gradient_except_in_ignored_rows(device, backend):
    logits, targets = draw((4,), 30, device)
    with use_backend(backend):
        lse = cross_entropy(logits.requires_grad_(), targets, return_lse=True).lse
        (dlogits,) = torch.autograd.grad(lse.sum(), logits)
    expected = torch.softmax(logits.detach(), dim=-1)
    expected[1] = 0
    torch.testing.assert_close(dlogits, expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_match_pytorch(device, backend, label_smoothing, reduction):
    logits, targets = draw((6,), 30, device)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    weights = torch.rand(30, device=device)
    with use_backend(backend):
        loss = cross_entropy(logits.requires_grad_(), targets, class_weights=weights, **options)
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    expected = F.cross_entropy(logits, targets, weights, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dlogits, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_is_zero_if_all_target_weights_are_zero(device, backend):
    with use_backend(backend):
        weights = torch.tensor([1.0, 0, 0], device=device)
        loss = cross_entropy(torch.randn(2, 3, device=device), torch.tensor([1, 2], device=device), class_weights=weights)
    assert loss.item() == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_z_loss_is_its_part_of_the_loss(device, backend, reduction, weighted):
    logits, targets = draw((5,), 30, device)
    options = {"reduction": reduction, "class_weights": torch.rand(30, device=device) if weighted else None}
    with use_backend(backend):
        with_z = cross_entropy(logits, targets, z_loss=0.1, return_z_loss=True, **options)
        without = cross_entropy(logits, targets, return_z_loss=True, **options)
    torch.testing.assert_close(with_z.loss - with_z.z_loss, without.loss)
    assert without.z_loss.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_z_loss_equals_float_z_loss(device, backend):
    logits, targets = draw((5,), 30, device)
    results = []
    for z_loss in (0.25, torch.tensor(0.25, device=device), torch.tensor(0.25, device=device, dtype=torch.float64)):
        with use_backend(backend):
            results.append(loss_and_gradient(cross_entropy, logits, targets, z_loss=z_loss, return_z_loss=True))
    for result in results[1:]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_are_the_first_argmax(device, backend, softcap):
    logits = torch.randint(0, 4, (6, 2 * MAX_BLOCK + 300), device=device).float() * 50
    logits[1] = -math.inf
    logits[2, MAX_BLOCK + 1] = 250
    logits[3, [5, 9000]] = math.inf
    logits[4, -1] = 151
    targets = torch.full((6,), -100, device=device)
    targets[:4] = logits[:4].argmax(dim=-1)
    with use_backend(backend), poisoned_memory():
        output = cross_entropy(logits, targets, softcap=softcap, return_predictions=True, return_accuracy=True)
    assert output.predictions.dtype == torch.int64
    assert torch.equal(output.predictions, logits.argmax(dim=-1))
    assert output.accuracy.item() == 1


@pytest.mark.parametrize("column", [0, 3, 4, 299])
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_with_nan_is_wrong_and_has_prediction_minus_one(device, backend, column):
    logits = torch.zeros(2, 300, device=device)
    logits[:, 4] = 9.0
    logits[0, column] = math.nan
    targets = torch.tensor([4, 4], device=device)
    with use_backend(backend):
        outputs = [cross_entropy(logits, targets, return_accuracy=True, return_predictions=p) for p in (False, True)]
    assert [output.accuracy.item() for output in outputs] == [0.5, 0.5]
    assert outputs[1].predictions.tolist() == [-1, 4]


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_row_of_nan_gives_zeros(device, backend, options):
    logits = torch.randn(3, 20, device=device)
    logits[1] = math.nan
    logits[2, 3] = math.inf
    targets = torch.tensor([2, -100, -100], device=device)
    with use_backend(backend), poisoned_memory():
        output = cross_entropy(logits.requires_grad_(), targets, reduction="none", return_lse=True, **options)
        (dlogits,) = torch.autograd.grad(output.loss.sum() + output.lse[:1].sum(), logits)
    assert output.loss[1:].tolist() == [0, 0]
    assert dlogits[1:].eq(0).all()
    assert dlogits[0].isfinite().all()
    assert output.lse[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_target_affects_only_its_loss(device, backend):
    logits, options = torch.randn(3, 20, device=device), {"z_loss": 0.1, "return_lse": True, "return_z_loss": True}
    with use_backend(backend):
        good, bad = (
            cross_entropy(logits, torch.tensor([2, target, 4], device=device), reduction="none", **options)
            for target in (3, 20)
        )
    assert good.loss.isfinite().all()
    assert bad.loss.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(bad.lse, good.lse)
    torch.testing.assert_close(bad.z_loss, good.z_loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_class_weights_match_pytorch(device, backend):
    logits, targets = torch.randn(2, 3, device=device), torch.tensor([0, 1], device=device)
    weights = torch.tensor([-1.0, -2.0, -1.0], device=device)
    with use_backend(backend):
        loss = cross_entropy(logits, targets, class_weights=weights)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, weights))


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "softcap"])
def test_option_values_do_not_recompile_kernels(device, monkeypatch, option):
    module, launched = sys.modules["tilewright.kernels.cross_entropy"], []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *args, **constants: launched.append(constants) or launch(*args, **constants))
    logits, targets = draw((3,), 30, device)
    for value in (0.25, 0.5):
        with use_backend("triton"):
            cross_entropy(logits.requires_grad_(), targets, **{option: value}).backward()
    assert len(launched) == 4
    assert launched[:2] == launched[2:]


@pytest.mark.slow
def test_z_loss_schedule_compiles_at_most_two_graphs(device):
    logits, targets = draw((4,), 40, device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(cross_entropy, fullgraph=True, backend=backend)
    with use_backend("triton"):
        for step in range(1, 11):
            loss = compiled(logits, targets, z_loss=step * 1e-3)
            torch.testing.assert_close(loss, cross_entropy(logits, targets, z_loss=step * 1e-3))
    assert len(graphs) <= 2
