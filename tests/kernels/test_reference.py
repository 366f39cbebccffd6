import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.kernels import attention, cross_entropy, linear_cross_entropy, reference, rope, swiglu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def tables(num_positions, head_dim):
    angles = torch.outer(torch.arange(num_positions).double(), 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim))
    return angles.cos(), angles.sin()


def test_rms_norm_equals_pytorch():
    x, weight = torch.randn(3, 7), torch.randn(7)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (7,), weight, 1e-5))


def test_swiglu_split_and_packed():
    gate, up = torch.randn(2, 3, 8)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(swiglu(gate, up), expected)
    torch.testing.assert_close(swiglu(torch.cat((gate, up), dim=-1)), expected)
    assert torch.autograd.gradcheck(swiglu, (double(2, 3), double(2, 3)))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rope_keeps_norms_and_depends_on_distances_only(layout):
    cos, sin = tables(32, 8)
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        at = [rope(x, cos, sin, torch.tensor([position]), layout) for x, position in ((q, i), (k, j))]
        return (at[0] * at[1]).sum().item()

    assert score(3, 1) == pytest.approx(score(30, 28))
    assert score(3, 1) != pytest.approx(score(4, 1))
    torch.testing.assert_close(rope(q, cos, sin, torch.tensor([9]), layout).norm(), q.norm())


def test_rope_rotates_by_complex_multiplication():
    cos, sin = tables(5, 6)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    rotated = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)).flatten(-2)
    torch.testing.assert_close(rope(x, cos, sin), rotated)
    half = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)  # the same pairs in Llama's order
    torch.testing.assert_close(rope(half, cos, sin, layout="half"), torch.cat((rotated[..., ::2], rotated[..., 1::2]), dim=-1))


def test_rope_positions_per_sequence():
    cos, sin = tables(16, 4)
    x = torch.randn(2, 3, 5, 4)
    positions = torch.tensor([[0, 1, 2, 0, 1], [4, 5, 6, 7, 8]])
    rotated = rope(x, cos, sin, positions)
    torch.testing.assert_close(rotated[1], rope(x[1:], cos[4:], sin[4:])[0])
    torch.testing.assert_close(rotated[0, :, 3:], rope(x[:1, :, 3:], cos, sin)[0])


def test_rope_unknown_layout_raises():
    with pytest.raises(ValueError, match=r"'diagonal'.*'interleaved' or 'half'"):
        rope(torch.randn(1, 4), *tables(1, 4), layout="diagonal")  # pyright: ignore


@pytest.mark.parametrize("function", [attention, reference.attention])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(6, 6), (1, 6), (3, 6)])
def test_attention_equals_sdpa_with_queries_at_the_end(function, num_queries, num_keys):
    q, k, v = torch.randn(2, 4, num_queries, 8), torch.randn(2, 2, num_keys, 8), torch.randn(2, 2, num_keys, 8)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(function(q, k, v), expected)
    torch.testing.assert_close(function(q, k, v, causal=False), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    torch.testing.assert_close(
        function(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    )


@settings(derandomize=True, deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), window=st.none() | st.integers(1, 5))
def test_packed_documents_equal_separate_calls(lengths, window):
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 4)
    separate = [
        attention(*parts, window=window) for parts in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    ]  # fmt: skip
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for packed in ({"document_ids": ids}, {"cu_seqlens": cu_seqlens}):
        torch.testing.assert_close(attention(q, k, v, window=window, **packed), torch.cat(separate, dim=2))


def test_a_window_keeps_the_last_keys_only():
    mask = reference.attention_mask(4, 4, window=2)
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_softcap_bounds_the_scores():
    q = k = torch.full((1, 1, 2, 4), 100.0)
    v = torch.tensor([[[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]]])
    torch.testing.assert_close(attention(q, k, v, softcap=5.0)[0, 0, 1], torch.tensor([0.5, 0.5, 0, 0]))
    scores = torch.randn(1, 1, 3, 4)
    torch.testing.assert_close(attention(scores, scores, scores, softcap=1e6), attention(scores, scores, scores))


def test_fully_masked_rows_give_zero_and_no_gradient():
    q, k, v = double(1, 1, 3, 2), double(1, 1, 1, 2), double(1, 1, 1, 2)
    out = reference.attention(q, k, v)  # the first two queries precede the only key
    assert out[0, 0, :2].eq(0).all()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad[0, 0, :2].eq(0).all()
    assert torch.isfinite(k.grad).all()  # pyright: ignore


def test_attention_passes_gradcheck():
    inputs = double(1, 2, 3, 2), double(1, 1, 3, 2), double(1, 1, 3, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: reference.attention(q, k, v, window=2, softcap=3.0), inputs)


def test_attention_bad_arguments_raise():
    q, k = torch.randn(1, 3, 4, 2), torch.randn(1, 2, 4, 2)
    with pytest.raises(ValueError, match="3 heads, k has 2"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="q has 4 tokens, k has 2: with documents, expected no more queries than keys"):
        attention(q, q[:, :, :2], q[:, :, :2], document_ids=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one of them"):
        attention(q, q, q, document_ids=torch.zeros(1, 4), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_equals_pytorch(reduction, label_smoothing):
    logits, targets = torch.randn(4, 5, 11), torch.randint(0, 11, (4, 5))
    targets[0, 2] = -100
    expected = F.cross_entropy(logits.mT, targets, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing), expected)


def test_cross_entropy_options_by_hand():
    logits, target = torch.tensor([1.0, 2.0, 4.0]), torch.tensor(2)
    lse = math.log(math.e + math.e**2 + math.e**4)
    assert cross_entropy(logits, target, z_loss=0.5).item() == pytest.approx(lse - 4 + 0.5 * lse**2)
    capped = [3 * math.tanh(x / 3) for x in (1.0, 2.0, 4.0)]
    expected = math.log(sum(map(math.exp, capped))) - capped[2]
    assert cross_entropy(logits, target, softcap=3.0).item() == pytest.approx(expected)


def test_cross_entropy_of_ignored_targets_is_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_cross_entropy_of_huge_and_equal_logits():
    assert cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([0])).item() == 0
    assert cross_entropy(torch.zeros(1, 8), torch.tensor([3])).item() == pytest.approx(math.log(8))
    assert cross_entropy(torch.tensor([[0.0, -math.inf]]), torch.tensor([0])).item() == 0


def test_cross_entropy_passes_gradcheck():
    def loss(logits):
        return cross_entropy(logits, torch.tensor([0, -100, 2]), label_smoothing=0.1, z_loss=0.01, softcap=4.0)

    assert torch.autograd.gradcheck(loss, (double(3, 5),))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("memory_budget", [1, 4 * 11 * 3, 2**30])
def test_linear_cross_entropy_equals_linear_then_cross_entropy(reduction, memory_budget):
    x, weight = double(2, 5, 4), double(11, 4)
    targets = torch.randint(0, 11, (2, 5))
    targets[1, 1] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "reduction": reduction}
    fused = linear_cross_entropy(x, weight, targets, memory_budget=memory_budget, **options)
    plain = cross_entropy(x @ weight.T, targets, **options)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(
        torch.autograd.grad(fused.sum(), (x, weight)), torch.autograd.grad(plain.sum(), (x, weight)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_unknown_reduction_raises():
    for function in (
        cross_entropy,
        lambda logits, *rest, **options: linear_cross_entropy(logits, torch.eye(3), *rest, **options),
    ):
        with pytest.raises(ValueError, match="'median'"):
            function(torch.randn(2, 3), torch.tensor([0, 1]), reduction="median")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x, weight = torch.randn(4, 64).to(dtype), torch.randn(64).to(dtype)
    assert torch.equal(reference.rms_norm(x, weight), reference.rms_norm(x.float(), weight.float()).to(dtype))
    assert torch.equal(swiglu(x, x), swiglu(x.float(), x.float()).to(dtype))
    assert cross_entropy(x, torch.zeros(4, dtype=torch.long)).dtype == torch.float32
