"""Attention on a GPU: real sizes in bfloat16, peak memory, CUDA graphs, compilation by Inductor, 64-bit offsets."""

from unittest import mock

import pytest
import torch

from attention_cases import CALLS, check, check_isolation, draw_case, without_decoding
from oracle import assert_accurate, assert_replays
from tilewright.bench.memory import peak_on_gpu
from tilewright.kernels import reference
from tilewright.kernels.attention import attention, configurations, use_attention_kernel

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.gpu
PORTABLE = "portable"
GLUON, FUSED = (
    pytest.param(form, marks=pytest.mark.skipif(not IS_HOPPER, reason="Gluon kernels are for Hopper"))
    for form in ("gluon", "fused")
)
# These override the parameters of the fixture `kernel`.
all_forms = pytest.mark.parametrize("kernel", [PORTABLE, GLUON, FUSED], indirect=True)
only_fused = pytest.mark.parametrize("kernel", [FUSED], indirect=True)


@pytest.fixture(autouse=True, params=[PORTABLE, GLUON])
def kernel(request):
    """Run each test with the portable and the Gluon kernels. Marked tests also run with the fused backward kernel."""
    with use_attention_kernel(request.param):
        yield request.param


def randn(*shape, **options):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, **options)


def gradients(inputs, do, **options):
    """Return o and the gradients of q, k, v."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    o = attention(*inputs, **options)
    return [o.detach(), *torch.autograd.grad(o, inputs, do)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 1000},
        {"softcap": 30.0, "sinks": True},
        {"cu_seqlens": torch.tensor([0, 1000, 1000, 1777, 4000])},
        {"cu_seqlens": torch.tensor([0, 1000, 1777]), "cu_seqlens_k": torch.tensor([0, 1500, 1600])},
    ],
)
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 64), ((4, 1), 128), ((1, 1), 256), ((2, 1), 80)])
def test_long_rows_in_bfloat16(heads, head_dim, options):
    options = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    check(draw_case(heads, (4096, 4096), head_dim, dtype=torch.bfloat16, memory=["packed"] * 4, **options))


@pytest.mark.parametrize(("heads", "lengths", "head_dim", "options"), CALLS)
def test_every_option(heads, lengths, head_dim, options):
    memory = ["tokens first", "packed", "heads first", "packed"]
    with without_decoding():
        check(draw_case(heads, lengths, head_dim, dtype=torch.bfloat16, memory=memory, **options))


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_reach_only_visible_rows(name, bad):
    check_isolation(name, bad, lambda case: case.run(attention))


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_float32_is_exact_unless_tf32_is_asked_for(allow_tf32):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 500, 64, device="cuda")
    o = attention(q, k, v, allow_tf32=allow_tf32)
    error = (o.double() - reference.attention(q.double(), k.double(), v.double())).abs().max()
    assert error < (5e-3 if allow_tf32 else 1e-5)
    assert (error > 1e-5) == allow_tf32


@all_forms
@pytest.mark.parametrize("window", [None, 4096])
def test_64k_tokens_on_a_sample_of_rows(window):
    # A row of o or dq needs one row of scores, a row of dk or dv one column, so float64 results fit in memory for a few rows.
    torch.manual_seed(0)
    num_tokens, head_dim = 65_536, 128
    q, k, v, do = randn(4, 1, 1, num_tokens, head_dim).unbind()
    o, dq, dk, dv = gradients((q, k, v), do, window=window)
    rows = torch.tensor([127, 128, 1000, 4095, 4096, 40_000, 65_407, 65_535], device="cuda")
    wide = [t[0, 0].double() for t in (q, k, v, do)]
    half = [t[0, 0].float() for t in (q, k, v, do)]
    positions = torch.arange(num_tokens, device="cuda")

    def visible(queries, keys):
        seen = keys[None] <= queries[:, None]
        return seen if window is None else seen & (keys[None] > queries[:, None] - window)

    def softmax_of(q, k, queries):
        scores = (q[queries] @ k.T * head_dim**-0.5).masked_fill(~visible(queries, positions), -torch.inf)
        return scores.softmax(dim=-1), scores.logsumexp(dim=-1)

    def by_queries(q, k, v, do):
        p, _ = softmax_of(q, k, rows)
        found = p @ v
        ds = p * (do[rows] @ v.T - (found * do[rows]).sum(dim=-1, keepdim=True))
        return found, ds @ k * head_dim**-0.5

    def by_keys(q, k, v, do):
        # The log-sum-exp and delta of all queries, a block at a time, then the columns of the sampled keys.
        found_dk, found_dv = torch.zeros(2, len(rows), head_dim, dtype=q.dtype, device="cuda")
        for queries in positions.split(1024):
            p, lse = softmax_of(q, k, queries)
            delta = (p @ v * do[queries]).sum(dim=-1)
            columns = torch.exp(q[queries] @ k[rows].T * head_dim**-0.5 - lse[:, None]).masked_fill(
                ~visible(queries, rows), 0.0
            )
            found_dv += columns.T @ do[queries]
            found_dk += (columns * (do[queries] @ v[rows].T - delta[:, None])).T @ q[queries] * head_dim**-0.5
        return found_dk, found_dv

    for function, actual in ((by_queries, (o, dq)), (by_keys, (dk, dv))):
        for result, plain, exact in zip(actual, function(*half), function(*wide), strict=True):
            sample = result[0, 0, rows]
            for i in range(len(rows)):
                assert_accurate(sample[i], plain[i].bfloat16(), exact[i], what=f"{function.__name__}, row {rows[i]}")


@all_forms
@pytest.mark.parametrize("options", [{}, {"window": 500, "softcap": 20.0}])
def test_results_are_deterministic_at_real_sizes(options):
    torch.manual_seed(0)
    q, do = randn(2, 2, 8, 2000, 128)
    k, v = randn(2, 2, 2, 2000, 128)
    first = gradients((q, k, v), do, **options)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients((q, k, v), do, **options), strict=True))


@only_fused
@pytest.mark.parametrize(
    ("heads", "num_tokens", "head_dim"),
    [((1, 1), 1, 128), ((8, 2), 300, 96), ((2, 1), 320, 128), ((2, 1), 1000, 80), ((4, 4), 4096, 128), ((8, 1), 4096, 128)],
)
def test_fused_backward(heads, num_tokens, head_dim):
    memory = ["tokens first", "packed", "heads first", "packed"]
    check(draw_case(heads, (num_tokens, num_tokens), head_dim, batch=2, dtype=torch.bfloat16, memory=memory))


@only_fused
def test_fused_backward_with_more_programs_than_run_at_once():
    torch.manual_seed(0)
    inputs, do = randn(3, 4, 32, 4000, 128).unbind(), randn(4, 32, 4000, 128)
    first = gradients(inputs, do)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(inputs, do), strict=True))
    with use_attention_kernel("portable"):
        expected = gradients(inputs, do)
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@only_fused
def test_fused_backward_inside_a_cuda_graph():
    q, do = randn(2, 2, 4, 500, 128)
    k, v = randn(2, 2, 2, 500, 128)
    assert_replays(lambda: gradients((q, k, v), do))


@only_fused
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_values_reach_only_visible_rows_in_fused_backward(name, bad):
    check_isolation(name, bad, lambda case: case.run(attention), 128, documents=False)


@pytest.mark.parametrize("num_queries", [1, 300])
def test_runs_inside_a_cuda_graph_without_synchronising(num_queries):
    q, do = randn(2, 2, 4, num_queries, 64)
    k, v = randn(2, 2, 2, 600, 64)
    options = {"cu_seqlens": torch.tensor([0, 100, 350], device="cuda"), "sinks": torch.randn(4, device="cuda")}
    assert_replays(lambda: gradients((q, k, v), do, **options))


def test_peak_memory_is_linear_in_the_length():
    def peak(num_tokens):
        q, k, v, do = randn(4, 1, 2, num_tokens, 64).unbind()
        gradients((q, k, v), do)
        return peak_on_gpu(lambda: gradients((q, k, v), do), q.device)

    small, large = peak(4096), peak(32_768)
    assert large <= 8.1 * small
    # o, dq, dk, dv and at most one copy in bfloat16; lse and delta in float32.
    assert large <= 2 * 32_768 * (5 * 64 * 2 + 2 * 4) + 2**22


@pytest.mark.huge
@pytest.mark.parametrize("memory", ["heads first", "tokens first"])
def test_offsets_exceed_32_bits(memory):
    # All heads but the last are 0. More than 2^31 elements precede the last head.
    heads, num_tokens, head_dim = 130, 2**17, 128
    shape = (1, heads, num_tokens, head_dim)
    x = torch.zeros(shape if memory == "heads first" else (1, num_tokens, heads, head_dim), device="cuda", dtype=torch.bfloat16)
    x = x if memory == "heads first" else x.transpose(1, 2)
    assert x.numel() > 2**31
    last = torch.randn(1, 1, num_tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    x[:, -1:] = last
    options = {"window": 64}
    results = gradients((x, x, x), x, **options)
    expected = gradients((last, last, last), last, **options)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a[:, -1:], b)
    assert not results[0][:, :-1].any()


@pytest.mark.parametrize("options", [{}, {"window": 200}, {"causal": False, "softcap": 20.0}])
def test_descriptors_and_pointers_give_equal_results(kernel, options):
    if kernel == "gluon":
        pytest.skip("without descriptors the portable kernels run, which sum in another order")
    torch.manual_seed(0)
    q, do = randn(2, 2, 4, 777, 128)
    k, v = randn(2, 2, 2, 777, 128)
    described = gradients((q, k, v), do, **options)
    with mock.patch.object(configurations, "fits_tma", return_value=False):
        pointed = gradients((q, k, v), do, **options)
    for a, b in zip(described, pointed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not IS_HOPPER, reason="Hopper's configurations")
def test_hopper_loads_through_descriptors(kernel):
    if kernel == "gluon":
        pytest.skip("Gluon kernels always use descriptors")
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    q, k, v, do = randn(4, 1, 2, 512, 128).unbind()
    # Triton caches the class at its first launch, so patch the method and not the class.
    with mock.patch.object(descriptor, "__init__", autospec=True, side_effect=descriptor.__init__) as described:
        o = attention(q.requires_grad_(), k, v)
        assert described.call_count == 3
        o.backward(do)
        assert described.call_count == 3 + 4 + 4


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor_equals_eager(dynamic):
    def attend(packed):
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in packed.sin().split((256, 128, 128), dim=-1))
        return attention(q, k, v, window=100).transpose(1, 2).flatten(-2) * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for num_tokens in (300, 500):
        packed = randn(2, num_tokens, 512, requires_grad=True)
        do = randn(2, num_tokens, 256)
        results = [(o := function(packed), *torch.autograd.grad(o, packed, do)) for function in (compiled, attend)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
