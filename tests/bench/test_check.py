import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilewright.bench import check
from tilewright.bench.check import Right, WrongError, compute, copies, what_is_right
from tilewright.bench.ops import Case
from tilewright.kernels import reference
from tilewright.kernels.op import ALL


def right_of(exact, reference=None):
    return Right(exact.double(), exact.bfloat16() if reference is None else reference)


@pytest.fixture
def losses():
    """Logits of a vocabulary as long as real ones, their targets, and what the loss and its gradient must be."""
    torch.manual_seed(0)
    inputs = torch.randn(16, 50_000).bfloat16().requires_grad_(), torch.randint(50_000, (16,))
    return inputs, what_is_right(reference.cross_entropy, lambda x, t: F.cross_entropy(x.float(), t), inputs)


def test_the_right_gradient_of_a_loss_passes(losses):
    (logits, targets), right = losses
    found = compute(
        lambda x, t: (torch.logsumexp(x.float(), -1) - x.float().gather(1, t[:, None])[:, 0]).mean(),
        copies((logits, targets)),
        True,
    )
    assert {name: right[name].check(own, name) for name, own in found.items()} == {"result 0": None, "gradient 0": None}


def test_small_values_are_held_to_their_own_size(losses):
    (logits, targets), right = losses
    gradient = compute(reference.cross_entropy, copies((logits, targets)), True)["gradient 0"]
    of_targets = torch.zeros_like(gradient).scatter(1, targets[:, None], gradient.gather(1, targets[:, None]))
    # To one rounding of the largest value this is as good.
    assert (of_targets - gradient).abs().max() < torch.finfo(torch.bfloat16).eps * gradient.abs().max()
    with pytest.raises(WrongError, match=r"gradient is off by .* times what rounding explains"):
        right["gradient 0"].check(of_targets, "gradient")
    # Nor may one row, one tile or one value be wrong, or missing.
    for place, factor in (((3,), 1.3), ((slice(0, 4), slice(128, 256)), 0.0), ((5, 77), float("nan")), ((5, 77), float("inf"))):
        broken = gradient.clone()
        broken[place] *= factor
        with pytest.raises(WrongError):
            right["gradient 0"].check(broken, "gradient")


def test_a_loss_that_misses_a_row_is_wrong(losses):
    (logits, targets), right = losses
    loss = F.cross_entropy(logits.float(), targets)
    assert right["result 0"].check(loss * (1 + 1e-6), "loss") is None
    with pytest.raises(WrongError):
        right["result 0"].check(F.cross_entropy(logits[1:].float(), targets[1:]), "loss")
    # In bfloat16 it is rounded as such.
    assert right["result 0"].check(loss.bfloat16(), "loss") is None


def test_an_error_may_be_twice_that_of_pytorch():
    torch.manual_seed(0)
    exact = torch.randn(4096)
    rough = (exact + 0.1 * torch.randn(4096)).bfloat16()
    off = (exact + 0.15 * torch.randn(4096)).bfloat16()
    assert right_of(exact, rough).check(off, "y") is None
    note = right_of(exact).check((exact * 1.02).bfloat16(), "y")
    assert note is not None
    assert note.startswith("y is off by ")
    with pytest.raises(WrongError):
        right_of(exact).check(off, "y")


def test_few_values_of_a_size_are_judged_with_the_next_larger_ones():
    exact = torch.ones(1000)
    exact[:10] = 1e-6
    own = exact.clone()
    own[:10] *= 1.5
    assert right_of(exact).check(own.bfloat16(), "y") is None
    # Of zeros nobody can be off by a share; what is far from them is wrong.
    zeros = torch.zeros(1000)
    assert right_of(zeros).check(zeros.bfloat16(), "y") is None
    with pytest.raises(WrongError):
        right_of(zeros).check(own.bfloat16(), "y")


def test_sums_over_chunks_are_the_same(monkeypatch, losses):
    (logits, targets), right = losses
    gradient = compute(reference.cross_entropy, copies((logits, targets)), True)["gradient 0"] * 1.01
    whole = right["gradient 0"].excess(gradient)
    monkeypatch.setattr(check, "CHUNK", 12_345)
    assert right["gradient 0"].excess(gradient) == pytest.approx(whole)


def test_another_shape_is_wrong():
    with pytest.raises(WrongError, match=r"y has the shape \(4,\) instead of \(2, 2\)"):
        right_of(torch.ones(2, 2)).check(torch.ones(4).bfloat16(), "y")


def test_copies():
    inputs = (torch.randn(3).bfloat16().requires_grad_(), torch.randn(3), torch.arange(3), 7)
    *exact, number = copies(inputs, exactly=True)
    assert [t.dtype for t in exact] == [torch.float64, torch.float64, torch.int64]
    assert [t.requires_grad for t in exact] == [True, False, False]
    assert number == 7
    assert not any(t.requires_grad for t in copies(inputs, backward=False)[:3])
    copies(inputs)[0].data.zero_()
    assert inputs[0].any()


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that there were."""

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


# The op's shapes that hold most, with a share of their rows.
@pytest.mark.parametrize(
    ("name", "size", "share"),
    [
        ("cross_entropy", {"vocab_size": 262_144}, 1024),
        ("swiglu", {"width": 14336}, 4096),
        ("add_rms_norm", {"width": 8192}, 4096),
        ("rms_norm", {"width": 32768}, 1024),
    ],
)
def test_an_h200_has_room_for_what_is_right(monkeypatch, name, size, share):
    monkeypatch.setattr(check, "CHUNK", check.CHUNK // share)
    sizes = next(sizes for sizes in ALL[name].shapes if size.items() <= sizes.items())
    case = Case(ALL[name], {**sizes, "rows": sizes["rows"] // share})
    device = torch.device("cpu")
    with Held() as held:
        arguments = case.arguments(device)
        inputs, right = arguments.positional, case.right(arguments)
    # 139 GiB, of which a context and libraries take some.
    assert sum(t.nbytes for t in inputs) < held.now < held.peak < 120e9 / share, held.peak * share / 1e9
    assert right
