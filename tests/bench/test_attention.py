import sys
from types import SimpleNamespace

import pytest
import torch

from tilewright.bench import attention_oracle, attention_peers, ops, peers
from tilewright.bench.attention_oracle import TOLERANCE, error_of, exact
from tilewright.bench.attention_peers import ATTENTION_PEERS
from tilewright.bench.ceilings import Ceilings
from tilewright.bench.check import output_gradients
from tilewright.bench.kernels import bench_case
from tilewright.bench.ops import Case
from tilewright.bench.peers import Unsupported
from tilewright.kernels import reference
from tilewright.kernels.attention.record import draw_lengths
from tilewright.kernels.op import ALL

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, matmul=1e9)


def shape(batch, num_heads, num_kv_heads, num_queries, num_keys, head_dim, **options):
    names = ("batch", "num_heads", "num_kv_heads", "num_queries", "num_keys", "head_dim")
    sizes = (batch, num_heads, num_kv_heads, num_queries, num_keys, head_dim)
    return Case(ALL["attention"], dict(zip(names, sizes, strict=True)) | options)


CASES = {
    "causal": shape(2, 2, 2, 40, 40, 16),
    "grouped": shape(2, 4, 1, 40, 40, 16),
    "window": shape(1, 2, 2, 40, 40, 16, window=7),
    "documents": shape(1, 2, 2, 40, 40, 16, document_lengths=(13, 1, 26)),
    "decoding": shape(3, 4, 1, 1, 40, 16),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def expected_of(case):
    """Return the arguments of a case, the gradient of its output, and the exact results."""
    arguments = case.arguments(CPU)
    (do,) = output_gradients((arguments.positional[0].detach(),))
    return arguments, do, exact(arguments, do)


def test_exact_results_do_not_depend_on_the_chunk_size(case, monkeypatch):
    arguments, do, whole = expected_of(case)
    monkeypatch.setattr(attention_oracle, "SCORES", 7 * case.sizes["num_heads"] * case.sizes["num_keys"])
    for name, expected in exact(arguments, do).items():
        torch.testing.assert_close(expected, whole[name], rtol=1e-9, atol=1e-11)
    leaves = [t.detach().double().requires_grad_() for t in arguments.positional]
    o = reference.attention(*leaves, **arguments.options)
    torch.testing.assert_close(whole["result 0"], o, rtol=1e-9, atol=1e-11)
    if "backward" in case.costs():
        for i, gradient in enumerate(torch.autograd.grad(o, leaves, do.double())):
            torch.testing.assert_close(whole[f"gradient {i}"], gradient, rtol=1e-9, atol=1e-11)
    assert (len(whole) == 4) == ("backward" in case.costs()) == (case.sizes["num_queries"] > 1)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [("cpu", None, torch.float64), ("cuda", (9, 0), torch.float64), ("cuda", (8, 9), torch.float32)],
)
def test_exact_results_are_float64_where_it_is_fast(device, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_oracle.precision(torch.device(device)) == dtype


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_flex_attention_masks_are_on_the_device_of_its_inputs(name, monkeypatch):
    """Emulate a GPU: meta tensors cannot mix with CPU tensors in the forward or backward pass, or when Dynamo traces."""
    sizes, meta = CASES[name].sizes, torch.device("meta")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="aot_eager", **options))
    monkeypatch.setattr(attention_peers, "FLEX_SHAPE", (sizes["num_heads"], sizes["num_kv_heads"], sizes["num_queries"]))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    q, k, v = CASES[name].arguments(meta).positional
    o = ATTENTION_PEERS["flex_attention"](sizes, meta)(q, k, v)
    assert [gradient.device for gradient in torch.autograd.grad(o.sum(), (q, k, v))] == [meta] * 3


def test_error_is_the_largest_token_error():
    expected = torch.ones(2, 3, 5, 4)
    assert error_of(expected, expected) == 0
    own = expected.clone()
    own[1, 2, 3] *= 1.5
    assert error_of(own, expected) == pytest.approx(0.5)
    # A token that is small by chance is not compared with its own norm.
    expected[:, :, 4] = 0
    own = expected.clone()
    own[:, :, 4] = 0.01
    assert error_of(own, expected) == pytest.approx(0.01 / 0.8**0.5)


def test_correct_variants_are_timed_in_every_direction(case, monkeypatch):
    monkeypatch.setattr(ops, "PEERS", {"attention": {"SDPA math": ATTENTION_PEERS["SDPA math"]}})
    rows = list(bench_case(case, CPU, CEILINGS))
    costs = case.costs()
    assert {(row["case"], row["variant"]) for row in rows} == {
        (f"{case.name} {direction}", variant) for direction in costs for variant in ("tilewright", "SDPA math")
    }
    plain = case == CASES["causal"]
    for row in rows:
        direction = row["case"].split()[-1]
        assert row["tflop_per_s"] == pytest.approx(costs[direction].flops / (row["p50_ms"] * 1e-3) / 1e12)
        assert row["share_of_matmul"] == pytest.approx(row["tflop_per_s"] * 1e12 / CEILINGS.matmul)
        assert (row.get("op"), row.get("size")) == ((f"attention K16 {direction}", 40) if plain else (None, None))


def test_a_wrong_mask_is_reported_instead_of_timed(monkeypatch):
    def full(sizes, device):
        return lambda q, k, v: reference.attention(q, k, v, causal=False)

    def not_a_number(sizes, device):
        return lambda q, k, v: q * torch.nan

    monkeypatch.setattr(ops, "PEERS", {"attention": {"full": full, "nan": not_a_number}})
    reasons = {row["variant"]: row.get("not_measured", "") for row in bench_case(CASES["causal"], CPU, CEILINGS)}
    assert reasons["full"].startswith("wrong: error of a token of result 0 is 1")
    assert reasons["nan"].startswith("wrong: error of a token of result 0 is nan")
    assert not reasons["tilewright"]


def test_the_leaderboard_shape_comes_first():
    first = next(ops.cases("attention"))
    assert first == shape(1, 16, 16, 16_384, 16_384, 64)
    pairs = 16_384 * 16_385 // 2
    assert first.costs()["both"].flops == 14 * 64 * 16 * pairs


def packed_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window_size=(-1, -1)):
    """Compute flash_attn_varlen_func with the reference: q (tokens, H, K), each document by itself."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max_k == (cu_q[1:] - cu_q[:-1]).max()
    assert causal or window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = [slice(start, end) for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False)]
    alone = [reference.attention(*(t[None, part].transpose(1, 2) for t in (q, k, v)), window=window) for part in parts]
    return torch.cat(alone, dim=2)[0].transpose(0, 1)


def flash_attention(q, k, v, causal=False, window_size=(-1, -1)):
    """Compute flash_attn_func with the reference: q (B, T, H, K); like early versions of flash-attn 3, it also returns lse."""
    assert causal
    window = None if window_size[0] < 0 else window_size[0] + 1
    return reference.attention(*(t.transpose(1, 2) for t in (q, k, v)), window=window).transpose(1, 2), None


def test_adapters_convert_layouts_and_masks(case, monkeypatch):
    module = SimpleNamespace(flash_attn_func=flash_attention, flash_attn_varlen_func=packed_attention)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    peers._find.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", packed_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(attention_peers, "FLEX_SHAPE", (2, 2, 40))
    arguments, _, expected = expected_of(case)
    q, k, v = (t.detach() for t in arguments.positional)
    computed = set()
    for name in ("SDPA flash", "SDPA math", "torch varlen", "flex_attention", "flash-attn 2"):
        try:
            o = ATTENTION_PEERS[name](case.sizes, CPU)(q, k, v)
        except Unsupported:
            continue
        assert error_of(o.detach(), expected["result 0"]) <= TOLERANCE, name
        computed.add(name)
    peers._find.cache_clear()
    plain = not case.sizes.keys() & {"window", "document_lengths"}
    assert computed == {"SDPA math", "flash-attn 2"} | ({"SDPA flash"} if plain else {"torch varlen"}) | (
        {"flex_attention"} if case.sizes["num_heads"] == case.sizes["num_kv_heads"] else set()
    )


def test_shapes_that_do_not_fit_are_skipped():
    long = shape(1, 16, 16, 65_536, 65_536, 128).sizes
    with pytest.raises(Unsupported, match="its scores take 275 GB"):
        ATTENTION_PEERS["SDPA math"](long, CPU)
    with pytest.raises(Unsupported, match="slow"):
        ATTENTION_PEERS["SDPA efficient"](long, CPU)
    with pytest.raises(Unsupported, match="mask has T x S"):
        ATTENTION_PEERS["SDPA cuDNN"](long | {"window": 1024}, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    shape(2, 16, 16, 2048, 2048, 128), shape(2, 16, 2, 2048, 2048, 64), shape(4, 32, 4, 1, 4096, 128),
    shape(1, 16, 16, 2048, 2048, 128, window=256), shape(1, 16, 16, 2048, 2048, 128, document_lengths=draw_lengths(2048)),
], ids=lambda case: case.name)  # fmt: skip
def test_a_shape_is_measured_on_a_gpu(case):
    rows = list(bench_case(case, torch.device("cuda"), Ceilings(4.8e12, 1e15)))
    timed = {(row["variant"], row["case"].split()[-1]) for row in rows if "p50_ms" in row}
    assert timed >= {("tilewright", direction) for direction in case.costs()}, rows
