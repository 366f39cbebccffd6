import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import DEVICE, MEMORY, Case, check, draw_case, some, tiles
from tilewright.kernels import reference, use_backend
from tilewright.kernels.attention import attention
from tilewright.kernels.attention.operands import with_unit_stride
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    # A row that sees no key has a sum of 0 and an lse of -inf. Only the interpreter warns about it.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    # Rows of a tile beyond the last key have arbitrary probabilities, which are never stored.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
]

# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
HEADS = [(1, 1), (2, 2), (2, 1), (4, 2), (3, 1)]
TILES = [(16, 16), (16, 32), (32, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 128, 256])
def test_forward_and_backward_equal_the_reference(dtype, head_dim):
    with tiles(32, 32):
        check(draw_case((2, 1), (70, 70), head_dim, dtype=dtype, seed=head_dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_shipped_configurations(dtype, head_dim):
    check(draw_case((2, 1), (150, 150), head_dim, dtype=dtype))


def any_documents(lengths, draw):
    """Return no option, or documents of random lengths as ids or cumulative lengths."""
    _, num_keys = lengths
    form = draw(st.sampled_from([None, None, "document_ids", "cu_seqlens"])) if lengths[0] <= num_keys else None
    if form is None:
        return {}
    borders = sorted(draw(st.lists(st.integers(0, num_keys), max_size=4)))
    if form == "cu_seqlens":
        return {
            "cu_seqlens": torch.tensor([0, *borders], dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)
        }
    positions = torch.arange(num_keys, device=DEVICE)
    return {"document_ids": sum((positions >= border for border in borders), torch.zeros_like(positions))[None]}


@some(max_examples=24)
@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_any_lengths_heads_and_options(data, seed, dtype):
    draw = data.draw
    heads, head_dim = draw(st.sampled_from(HEADS)), draw(st.sampled_from([16, 16, 20, 40, 64]))
    num_keys = draw(st.integers(1, 66))
    lengths = draw(st.sampled_from([num_keys, max(1, num_keys - 17), num_keys + 5]) | st.integers(1, 66)), num_keys
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(2, 40)),
        "softcap": draw(st.sampled_from([None, None, 0.5, 30.0])),
        "scale": draw(st.sampled_from([None, None, 0.3, -0.2])),
        "sinks": draw(st.booleans()),
        "dlse": draw(st.booleans()),
    }
    with tiles(*draw(st.sampled_from(TILES)), tma=draw(st.booleans()), splits=draw(st.sampled_from([1, 3]))):
        check(draw_case(heads, lengths, head_dim, dtype=dtype, seed=seed, **options, **any_documents(lengths, draw)))


@some(max_examples=8)
@given(
    memory=st.tuples(*[st.sampled_from(list(MEMORY))] * 4),
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([16, 20]),
    lengths=st.sampled_from([(37, 37), (20, 33)]),
    batch=st.integers(1, 2),
    tma=st.booleans(),
)
def test_any_memory(memory, heads, head_dim, lengths, batch, tma):
    with tiles(32, 16, tma=tma):
        check(draw_case(heads, lengths, head_dim, batch=batch, memory=memory))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(48, 16), (16, 40), (192, 128)])
@pytest.mark.parametrize("lengths", [(40, 40), (2, 70)])
@pytest.mark.parametrize("memory", ["tokens first", "odd token stride"])
def test_value_dim_differs_from_head_dim(head_dim, value_dim, lengths, memory):
    with tiles(16, 32, splits=2):
        check(draw_case((2, 1), lengths, head_dim, value_dim=value_dim, dtype=torch.float16, memory=(memory,) * 4, sinks=True))


@pytest.mark.parametrize("memory", MEMORY)
def test_only_strided_channels_are_copied(memory):
    x = MEMORY[memory](2, 3, 5, 8)
    y = with_unit_stride(x)
    assert (y is x) == (memory not in ("every other channel", "channels first", "one number"))
    assert y.stride(-1) == 1


@pytest.mark.parametrize("memory", ["tokens first", "packed"])
def test_results_and_gradients_keep_the_layout_of_a_projection(memory):
    case = draw_case((4, 2), (5, 5), 16, batch=2, memory=[memory] * 4)
    with use_backend("triton"):
        results = case.run(attention)
    for name in ("o", "dq", "dk", "dv"):
        assert results[name].transpose(1, 2).is_contiguous(), name


@pytest.mark.parametrize("heads", [(5, 5), (6, 2)])
@pytest.mark.parametrize("rows_at_once", [2, 4])
def test_rows_are_processed_in_groups(heads, rows_at_once):
    with tiles(16, 16, rows_at_once=rows_at_once):
        check(draw_case(heads, (20, 20), 16))


@pytest.mark.parametrize(
    "options", [{"scale": 0.0}, {"scale": 0.0, "softcap": 3.0}, {"window": 1}, {"window": 1, "scale": -2.0}]
)
def test_equal_scores_and_single_keys(options):
    with tiles(16, 16):
        check(draw_case((2, 1), (40, 40), 16, **options))


@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (1, 2)])
def test_the_shortest_sequences(lengths):
    check(draw_case((2, 1), lengths, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores(dtype, size):
    case = draw_case((2, 1), (40, 40), 16, dtype=dtype, sinks=True)
    case.q.mul_(size**0.5 if size > 0 else -((-size) ** 0.5))
    case.k.mul_(abs(size) ** 0.5)
    with tiles(16, 16):
        check(case)


def test_large_scores_of_one_sign():
    # All far below 0, where a maximum initialized to 0 would underflow every exponential; and all far above.
    for sign in (-1, 1):
        case = draw_case((1, 1), (40, 40), 16)
        case.q.abs_().add_(1).mul_(100)
        case.k.abs_().add_(1).mul_(100 * sign)
        with tiles(16, 16):
            check(case)


def test_queries_before_the_first_key_give_zero():
    case = draw_case((2, 1), (50, 30), 16, batch=2)
    with tiles(16, 16):
        results = check(case)
    assert results["lse"][:, :, :20].eq(-torch.inf).all()
    assert results["lse"][:, :, 20:].isfinite().all()
    assert not results["o"][:, :, :20].any()
    assert not results["dq"][:, :, :20].any()
    with tiles(16, 16):
        with_sinks = check(draw_case((2, 1), (50, 30), 16, batch=2, sinks=True))
    assert with_sinks["lse"].isfinite().all()


@pytest.mark.parametrize(
    "shapes", [((2, 2, 3, 16), (2, 1, 0, 16)), ((2, 2, 0, 16), (2, 1, 3, 16)), ((0, 2, 3, 16), (0, 1, 3, 16))]
)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_empty_tensors(shapes, has_sinks):
    q, k, v = (torch.randn(shape, device=DEVICE) for shape in (shapes[0], shapes[1], shapes[1]))
    sinks = torch.randn(2, device=DEVICE) if has_sinks else None
    # Without keys and sinks the reference's lse is constant and has no gradient.
    dlse = torch.randn(q.shape[:3], device=DEVICE) if has_sinks else None
    check(Case(q, k, v, torch.randn_like(q), dlse, sinks))


def test_a_gradient_of_one_result_or_to_one_input():
    case = draw_case((2, 1), (20, 20), 16)

    def found(function):
        q, k, v = (t.detach().requires_grad_() for t in (case.q, case.k, case.v))
        of_lse = torch.autograd.grad(function(q, k, v, return_lse=True)[1], (q, k), case.dlse)
        of_o = torch.autograd.grad(function(q, k, v), (q, k, v), case.do)
        of_v = torch.autograd.grad(function(q.detach(), k.detach(), v), v, case.do)
        return [*of_lse, *of_o, *of_v]

    with use_backend("triton"):
        actual = found(attention)
    for a, b in zip(actual, found(reference.attention), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["heads first", "packed"])
def test_descriptors_and_pointers_load_the_same_tiles(memory):
    case = draw_case(
        (2, 1), (40, 50), 20 if memory == "heads first" else 32, dtype=torch.float16, memory=[memory] * 4, window=30
    )
    results = []
    for tma in (False, True):
        with tiles(16, 32, tma=tma), use_backend("triton"):
            results.append(case.run(attention))
    for name, result in results[0].items():
        assert torch.equal(result, results[1][name]), name


@pytest.mark.parametrize("sinks", [torch.linspace(-1, 2, 6).view(2, 3)[:, 0], torch.tensor([0.7]).expand(2)])
@pytest.mark.parametrize("lengths", [(40, 40), (1, 40)])
def test_sinks_of_any_stride(lengths, sinks):
    with tiles(16, 16):
        check(dataclasses.replace(draw_case((2, 1), lengths, 16), sinks=sinks.to(DEVICE)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(40, 40), (40, 20), (20, 40)])
def test_a_window_longer_than_the_sequence_has_no_effect(lengths, causal):
    case = draw_case((2, 1), lengths, 16, causal=causal)
    endless = dataclasses.replace(case, options={**case.options, "window": 2**40})
    with tiles(16, 16), use_backend("triton"):
        expected = case.run(attention)
        for name, actual in endless.run(attention).items():
            assert torch.equal(actual, expected[name]), name


def test_the_gradient_of_an_infinite_lse_reaches_no_input():
    # The square of -inf has the gradient -inf, and 0 * -inf is NaN, even if the loss uses only other rows.
    q, k, v = (torch.randn(1, 1, length, 16, device=DEVICE, requires_grad=True) for length in (30, 12, 12))
    with use_backend("triton"), tiles(16, 16):
        _, lse = attention(q, k, v, return_lse=True)
        gradients = torch.autograd.grad(lse.square()[..., -12:].sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][:, :, :18].eq(0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_propagates_to_its_row_only(softcap):
    q, k, v = (torch.randn(1, 1, 40, 16, device=DEVICE) for _ in range(3))
    q[0, 0, 7, 3] = torch.nan
    with use_backend("triton"), tiles(16, 16):
        o, lse = attention(q, k, v, softcap=softcap, return_lse=True)
    assert o[0, 0, 7].isnan().all()
    assert lse[0, 0, 7].isnan()
    assert o[0, 0, 8:].isfinite().all()
