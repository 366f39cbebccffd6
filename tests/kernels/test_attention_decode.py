import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import DEVICE, check, draw_case, some, tiles, without_decoding
from tilewright.kernels import use_backend
from tilewright.kernels.attention import attention, decode
from tilewright.kernels.attention.options import Options
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
PLAIN = Options(causal=True, scale=1.0, window=None, softcap=None, precision="ieee")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "splits"), [(16, 1), (80, 2), (128, 5), (80, 1), (16, 5)])
def test_decoding_equals_the_reference(dtype, head_dim, splits):
    with tiles(16, 32, splits=splits):
        check(draw_case((4, 2), (1, 150), head_dim, dtype=dtype))


@some(max_examples=14)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    batch=st.integers(1, 2),
    num_queries=st.integers(1, 7),
    num_keys=st.integers(8, 90),
    splits=st.integers(1, 9),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 70),
    softcap=st.sampled_from([None, None, 2.0]),
    sinks=st.booleans(),
    border=st.none() | st.integers(0, 90),
    seed=st.integers(0, 99),
)
def test_decoding_equals_the_full_pass(
    heads, batch, num_queries, num_keys, splits, causal, window, softcap, sinks, border, seed
):
    options = {"causal": causal, "window": window, "softcap": softcap}
    if border is not None:
        options["cu_seqlens"] = torch.tensor([0, border], device=DEVICE)
    case = draw_case(heads, (num_queries, num_keys), 16, batch=batch, sinks=sinks, seed=seed)
    with tiles(64, 16, splits=splits), use_backend("triton"), torch.no_grad():
        assert decode.fits_decode(case.q, case.k, PLAIN)
        arguments = {"q": case.q, "k": case.k, "v": case.v, "sinks": case.sinks, "return_lse": True, **options}
        results = attention(**arguments)
        with without_decoding():
            expected = attention(**arguments)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_decoding_equals_the_last_queries_of_a_full_pass():
    case = draw_case((4, 2), (60, 60), 32, batch=2)
    with use_backend("triton"), tiles(16, 16, splits=3):
        whole = attention(case.q, case.k, case.v, window=40)
        last = attention(case.q[:, :, -3:], case.k, case.v, window=40)
    torch.testing.assert_close(last, whole[:, :, -3:])


@pytest.mark.parametrize(
    "memory",
    [("tokens first",) * 4, ("packed",) * 4, ("one element on", "odd token stride", "every other token", "one number")],
)
def test_caches_of_any_memory(memory):
    with tiles(16, 16, splits=2):
        check(draw_case((4, 2), (2, 45), 20, batch=2, memory=memory, sinks=True))


def test_a_cache_with_free_space():
    # As in generation: the keys are a slice of a longer buffer.
    cache = torch.full((2, 2, 2, 80, 16), torch.nan, device=DEVICE)
    cache[..., :50, :] = torch.randn(2, 2, 2, 50, 16, device=DEVICE)
    k, v = cache[..., :50, :]
    q = torch.randn(2, 4, 1, 16, device=DEVICE)
    with use_backend("triton"), tiles(16, 16, splits=3):
        torch.testing.assert_close(attention(q, k, v), attention(q, k.contiguous(), v.contiguous()))
        assert attention(q, k, v).isfinite().all()


@pytest.mark.parametrize("sinks", [False, True])
def test_more_splits_than_one_iteration_combines(sinks):
    with tiles(16, 16, splits=2 * decode.BLOCK_SPLITS + 3):
        check(draw_case((2, 1), (2, 500), 16, sinks=sinks, window=450))


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "splits"), [(1, 255, 1), (1, 600, 2), (1, 10**6, 6), (4, 10**6, 2), (9, 10**6, 1)]
)
def test_splits_fill_the_multiprocessors_but_are_not_too_short(monkeypatch, num_rows, num_keys, splits):
    monkeypatch.setattr(decode, "num_sms", lambda device: 2)
    monkeypatch.setattr(decode, "PROGRAMS_PER_SM", 3)
    assert decode.splits_of(num_rows, num_keys, DEVICE) == splits


@pytest.mark.parametrize(
    ("queries", "num_keys", "fits"),
    [
        ((8, 1), 100, True),
        ((8, 8), 100, True),
        ((8, 9), 100, False),
        ((1, 5), 5, False),
        ((1, 5), 6, True),
        ((65, 1), 100, False),
    ],
)
def test_which_calls_decode(queries, num_keys, fits):
    q, k = torch.empty(1, *queries, 16), torch.empty(1, 1, num_keys, 16)
    with tiles(64, 16):
        assert decode.fits_decode(q, k, PLAIN) == fits


def test_decoding_gives_equal_bits():
    case = draw_case((4, 1), (2, 600), 32, sinks=True)
    with use_backend("triton"):
        first, second = (case.run(attention) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
