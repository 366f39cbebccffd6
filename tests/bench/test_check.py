import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilewright.bench import check
from tilewright.bench.check import Expected, WrongError, compute, copies, expected_results
from tilewright.bench.ops import Case
from tilewright.kernels import reference
from tilewright.kernels.op import ALL


def expected_of(exact, reference=None):
    return Expected(exact.double(), exact.bfloat16() if reference is None else reference)


@pytest.fixture
def losses():
    """Logits of a realistic vocabulary, their targets, and the expected loss and gradient."""
    torch.manual_seed(0)
    inputs = torch.randn(16, 50_000).bfloat16().requires_grad_(), torch.randint(50_000, (16,))
    return inputs, expected_results(reference.cross_entropy, lambda x, t: F.cross_entropy(x.float(), t), inputs)


def test_the_correct_gradient_of_a_loss_passes(losses):
    (logits, targets), expected = losses
    found = compute(
        lambda x, t: (torch.logsumexp(x.float(), -1) - x.float().gather(1, t[:, None])[:, 0]).mean(),
        copies((logits, targets)),
        True,
    )
    assert {name: expected[name].check(own, name) for name, own in found.items()} == {"result 0": None, "gradient 0": None}


def test_small_values_have_their_own_tolerance(losses):
    (logits, targets), expected = losses
    gradient = compute(reference.cross_entropy, copies((logits, targets)), True)["gradient 0"]
    of_targets = torch.zeros_like(gradient).scatter(1, targets[:, None], gradient.gather(1, targets[:, None]))
    # One rounding of the largest value would not distinguish these.
    assert (of_targets - gradient).abs().max() < torch.finfo(torch.bfloat16).eps * gradient.abs().max()
    with pytest.raises(WrongError, match=r"error of gradient is .* times the tolerance"):
        expected["gradient 0"].check(of_targets, "gradient")
    # A wrong or missing row, tile or value is found too.
    for place, factor in (((3,), 1.3), ((slice(0, 4), slice(128, 256)), 0.0), ((5, 77), float("nan")), ((5, 77), float("inf"))):
        broken = gradient.clone()
        broken[place] *= factor
        with pytest.raises(WrongError):
            expected["gradient 0"].check(broken, "gradient")


def test_a_loss_that_misses_a_row_is_wrong(losses):
    (logits, targets), expected = losses
    loss = F.cross_entropy(logits.float(), targets)
    assert expected["result 0"].check(loss * (1 + 1e-6), "loss") is None
    with pytest.raises(WrongError):
        expected["result 0"].check(F.cross_entropy(logits[1:].float(), targets[1:]), "loss")
    # A bfloat16 loss is compared with bfloat16 rounding.
    assert expected["result 0"].check(loss.bfloat16(), "loss") is None


def test_errors_up_to_twice_pytorchs_pass():
    torch.manual_seed(0)
    exact = torch.randn(4096)
    rough = (exact + 0.1 * torch.randn(4096)).bfloat16()
    off = (exact + 0.15 * torch.randn(4096)).bfloat16()
    assert expected_of(exact, rough).check(off, "y") is None
    note = expected_of(exact).check((exact * 1.02).bfloat16(), "y")
    assert note is not None
    assert note.startswith("error of y is ")
    with pytest.raises(WrongError):
        expected_of(exact).check(off, "y")


def test_small_groups_merge_with_larger_magnitudes():
    exact = torch.ones(1000)
    exact[:10] = 1e-6
    own = exact.clone()
    own[:10] *= 1.5
    assert expected_of(exact).check(own.bfloat16(), "y") is None
    # Zeros have no relative error; values far from zero are wrong.
    zeros = torch.zeros(1000)
    assert expected_of(zeros).check(zeros.bfloat16(), "y") is None
    with pytest.raises(WrongError):
        expected_of(zeros).check(own.bfloat16(), "y")


def test_chunking_does_not_change_the_result(monkeypatch, losses):
    (logits, targets), expected = losses
    gradient = compute(reference.cross_entropy, copies((logits, targets)), True)["gradient 0"] * 1.01
    whole = expected["gradient 0"].excess(gradient)
    monkeypatch.setattr(check, "CHUNK", 12_345)
    assert expected["gradient 0"].excess(gradient) == pytest.approx(whole)


def test_a_different_shape_is_wrong():
    with pytest.raises(WrongError, match=r"y has the shape \(4,\): expected \(2, 2\)"):
        expected_of(torch.ones(2, 2)).check(torch.ones(4).bfloat16(), "y")


def test_copies():
    inputs = (torch.randn(3).bfloat16().requires_grad_(), torch.randn(3), torch.arange(3), 7)
    *exact, number = copies(inputs, exactly=True)
    assert [t.dtype for t in exact] == [torch.float64, torch.float64, torch.int64]
    assert [t.requires_grad for t in exact] == [True, False, False]
    assert number == 7
    assert not any(t.requires_grad for t in copies(inputs, backward=False)[:3])
    copies(inputs)[0].data.zero_()
    assert inputs[0].any()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(results) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return results

    def free(self, storage):
        self.now -= self.sizes.pop(storage)


# The shapes of each op that use most memory, with a fraction of their rows.
@pytest.mark.parametrize(
    ("name", "size", "share"),
    [
        ("cross_entropy", {"vocab_size": 262_144}, 1024),
        ("swiglu", {"width": 14336}, 4096),
        ("add_rms_norm", {"width": 8192}, 4096),
        ("rms_norm", {"width": 32768}, 1024),
    ],
)
def test_expected_results_fit_on_an_h200(monkeypatch, name, size, share):
    monkeypatch.setattr(check, "CHUNK", check.CHUNK // share)
    sizes = next(sizes for sizes in ALL[name].shapes if size.items() <= sizes.items())
    case = Case(ALL[name], {**sizes, "rows": sizes["rows"] // share})
    device = torch.device("cpu")
    with LiveBytes() as live:
        arguments = case.arguments(device)
        inputs, expected = arguments.positional, case.expected(arguments)
    # The GPU has 139 GiB; the context and libraries need some.
    assert sum(t.nbytes for t in inputs) < live.now < live.peak < 120e9 / share, live.peak * share / 1e9
    assert expected
