"""FlashAttention-2 in PyTorch, compared with the reference that materializes the scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.kernels import reference, tiled_attention


def results(function, inputs, do, **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    o = function(*inputs, **options)
    return [o, *torch.autograd.grad(o, inputs, do)]


def check(shape, num_keys, dtype=torch.float64, causal=True, scale=None, **blocks):
    torch.manual_seed(0)
    q, do = torch.randn(2, *shape, dtype=dtype)
    k, v = torch.randn(2, *shape[:-2], num_keys, shape[-1], dtype=dtype)
    actual = results(tiled_attention, (q, k, v), do, causal=causal, scale=scale, **blocks)

    def plain(q, k, v):
        return reference.attention(*(t.flatten(0, -3)[None] for t in (q, k, v)), causal, scale).view(shape)

    for a, b in zip(actual, results(plain, (q, k, v), do), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=2e-6 if dtype == torch.float32 else 1e-9
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shape_of_the_handout(dtype, causal):
    check((4, 128, 64), 128, dtype, causal)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    batch=st.sampled_from([(1,), (2, 3)]),
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 40),
    head_dim=st.sampled_from([1, 5, 8]),
    blocks=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.0, -1.5]),
)
def test_any_lengths_and_tiles(batch, num_queries, num_keys, head_dim, blocks, causal, scale):
    check((*batch, num_queries, head_dim), num_keys, causal=causal, scale=scale, block_m=blocks[0], block_n=blocks[1])


def test_gradcheck():
    q, k, v = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, block_m=2, block_n=3), (q, k, v))


def test_saved_tensors_exclude_the_scores():
    kept = []
    q, k, v = torch.randn(3, 4, 50, 8, requires_grad=True).unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        o = tiled_attention(q, k, v, block_m=16, block_n=16)
    tiled = [shape for shape in kept if len(shape) < 4]
    assert sorted(tiled) == [(4, 50), *[(4, 50, 8)] * 4]
    assert o.shape == (4, 50, 8)


def test_large_scores_and_queries_before_the_first_key():
    q, k, v = (torch.randn(1, n, 8) for n in (9, 4, 4))
    o = tiled_attention(1e4 * q, k, v, block_m=2, block_n=2)
    assert not o[:, :5].any()
    assert o.isfinite().all()
    torch.testing.assert_close(o[0], reference.attention(1e4 * q[None], k[None], v[None])[0, 0])


@pytest.mark.parametrize(
    ("shapes", "blocks", "message"),
    [
        (((1, 4, 8), (1, 4, 8), (1, 5, 8)), {}, r"v \(1, 5, 8\)"),
        (((2, 4, 8), (1, 4, 8), (1, 4, 8)), {}, r"q has shape \(2, 4, 8\)"),
        (((1, 4, 8), (1, 4, 7), (1, 4, 7)), {}, r"k \(1, 4, 7\)"),
        (((1, 4, 8), (1, 4, 8), (1, 4, 8)), {"block_n": 0}, "block_m is 64, block_n 0"),
    ],
)
def test_bad_arguments_are_errors(shapes, blocks, message):
    with pytest.raises(ValueError, match=message):
        tiled_attention(*map(torch.ones, shapes), **blocks)
