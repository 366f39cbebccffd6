import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tilewright.bench import attention_cases, attention_peers
from tilewright.bench.attention import attention_jobs, bench_attention_case
from tilewright.bench.attention_cases import TOLERANCE, AttentionCase, draw_lengths, error_of, exact
from tilewright.bench.attention_peers import PEERS, Unsupported, installed_peers
from tilewright.bench.ceilings import Ceilings
from tilewright.kernels import reference

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, matmul=1e9)
CASES = {
    "causal": AttentionCase(2, 2, 2, 40, 40, 16),
    "grouped": AttentionCase(2, 4, 1, 40, 40, 16),
    "window": AttentionCase(1, 2, 2, 40, 40, 16, window=7),
    "documents": AttentionCase(1, 2, 2, 40, 40, 16, document_lengths=(13, 1, 26)),
    "decoding": AttentionCase(3, 4, 1, 1, 40, 16),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def masked_attention(case):
    """Attention by the mask of a case, in float32."""
    mask = case.mask(CPU)
    return lambda q, k, v: F.scaled_dot_product_attention(
        *(t.float() for t in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).to(q.dtype)  # fmt: skip


def test_what_is_exact_does_not_depend_on_how_many_queries_at_a_time(case, monkeypatch):
    q, k, v, do = case.make(CPU)
    whole = exact(case, q, k, v, do)
    monkeypatch.setattr(attention_cases, "SCORES", 7 * case.num_heads * case.num_keys)
    for name, right in exact(case, q, k, v, do).items():
        torch.testing.assert_close(right, whole[name], rtol=1e-4, atol=1e-5)
    leaves = [t.float().requires_grad_() for t in (q, k, v)]
    o = reference.attention(*leaves, window=case.window, cu_seqlens=case.cu_seqlens(CPU))
    torch.testing.assert_close(whole["o"], o, rtol=1e-4, atol=1e-5)
    gradients = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do.float()), strict=True))
    assert whole.keys() == {"o"} | (gradients.keys() if case.num_queries > 1 else set())
    for name in whole.keys() - {"o"}:
        torch.testing.assert_close(whole[name], gradients[name], rtol=1e-4, atol=1e-5)


def test_the_mask_and_the_pairs_of_a_case_agree(case):
    pairs = case.mask(CPU).sum().item()
    assert case.costs["forward"].flops == 4 * pairs * case.head_dim * case.num_heads * case.batch


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_what_flex_attention_closes_over_is_where_its_inputs_are(name, monkeypatch):
    """As on a GPU: tensors without memory do not mix with those of the CPU, forward, backward or where Dynamo traces them."""
    case, meta = CASES[name], torch.device("meta")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend="aot_eager", **options))
    monkeypatch.setattr(attention_peers, "FLEX_SHAPE", (case.num_heads, case.num_kv_heads, case.num_queries))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    shape = (case.batch, case.num_heads, case.num_queries, case.head_dim)
    q, k, v = (torch.empty(shape, device=meta, requires_grad=True) for _ in range(3))
    o = attention_peers.PEERS["flex_attention"](case, meta)(q, k, v)
    assert [gradient.device for gradient in torch.autograd.grad(o.sum(), (q, k, v))] == [meta] * 3


def test_the_error_is_that_of_the_worst_token():
    right = torch.ones(2, 3, 5, 4)
    assert error_of(right, right) == 0
    own = right.clone()
    own[1, 2, 3] *= 1.5
    assert error_of(own, right) == pytest.approx(0.5)
    # A token that is small by chance is not held to a share of itself.
    right[:, :, 4] = 0
    own = right.clone()
    own[:, :, 4] = 0.01
    assert error_of(own, right) == pytest.approx(0.01 / 0.8**0.5)


def test_every_right_peer_is_timed_in_every_direction(case):
    peers = {"tilewright": PEERS["tilewright"], "SDPA math": PEERS["SDPA math"]}
    rows = list(bench_attention_case(case, peers, CPU, CEILINGS))
    assert {(row["case"], row["variant"]) for row in rows} == {
        (f"{case.name} {direction}", variant) for direction in case.costs for variant in peers
    }
    for row in rows:
        cost = case.costs[row["case"].split()[-1]]
        assert row["tflop_per_s"] == pytest.approx(cost.flops / (row["p50_ms"] * 1e-3) / 1e12)
        assert row["share_of_matmul"] == pytest.approx(row["tflop_per_s"] * 1e12 / CEILINGS.matmul)


def test_wrong_and_failing_peers_are_named_instead_of_timed():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return masked_attention(CASES["causal"])(q, k, v)

        @staticmethod
        def backward(ctx, *gradients):
            raise RuntimeError("no such head dim")

    def unsupported(case, device):
        raise Unsupported("takes no mask")

    def fail(q, k, v):
        raise RuntimeError("no kernel")

    peers = {
        "right": lambda case, device: masked_attention(case),
        "full": lambda case, device: lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "nan": lambda case, device: lambda q, k, v: q * torch.nan,
        "unsupported": unsupported,
        "failing": lambda case, device: fail,
        "no backward": lambda case, device: NoBackward.apply,
    }
    rows = list(bench_attention_case(CASES["causal"], peers, CPU, CEILINGS))
    reasons = {row["variant"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert reasons["full"].startswith("wrong: o of a token is off by 1")
    assert reasons["nan"].startswith("wrong: o of a token is off by nan")
    assert reasons["unsupported"] == "takes no mask"
    assert reasons["failing"] == "RuntimeError: no kernel"
    assert reasons["no backward"] == "RuntimeError: no such head dim"
    timed = {(row["variant"], row["case"].split()[-1]) for row in rows if "p50_ms" in row}
    assert timed == {("right", "forward"), ("right", "backward"), ("right", "both"), ("no backward", "forward")}


def test_every_shape_is_a_job_after_the_missing_peers(monkeypatch):
    monkeypatch.setattr(attention_peers, "MODULES", {"flash-attn 2": "no_such_module"})
    first, *jobs = attention_jobs(CPU, CEILINGS)
    assert [row["variant"] for row in first.rows()] == ["flash-attn 2"]
    cases = list(attention_cases.attention_cases())
    assert [job.case for job in jobs] == [case.name for case in cases]
    assert len({case.name for case in cases}) == len(cases)


def test_plain_shapes_are_marked_as_a_series_over_the_length(case):
    rows = list(bench_attention_case(case, {"tilewright": PEERS["tilewright"]}, CPU, CEILINGS))
    plain = case == CASES["causal"]
    assert [row.get("op") for row in rows] == [f"attention K16 {way}" if plain else None for way in case.costs]
    assert all(row.get("size") == (40 if plain else None) for row in rows)


def test_the_shape_that_the_course_ranks_comes_first():
    first = next(attention_cases.attention_cases())
    assert first == AttentionCase(1, 16, 16, 16_384, 16_384, 64)
    pairs = 16_384 * 16_385 // 2
    assert first.costs["both"].flops == 14 * 64 * 16 * pairs


def test_lengths_of_documents_are_drawn_alike():
    lengths = draw_lengths(16_384)
    assert lengths == draw_lengths(16_384) != draw_lengths(16_384, seed=1)
    assert sum(lengths) == 16_384
    assert min(lengths) > 0
    assert len(lengths) > 5


def packed_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window_size=(-1, -1)):
    """What flash_attn_varlen_func computes: q (tokens, H, K), each document by itself."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max_k == (cu_q[1:] - cu_q[:-1]).max()
    assert causal or window_size[1] == 0
    window = None if window_size[0] < 0 else window_size[0] + 1
    parts = [slice(start, end) for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False)]
    alone = [reference.attention(*(t[None, part].transpose(1, 2) for t in (q, k, v)), window=window) for part in parts]
    return torch.cat(alone, dim=2)[0].transpose(0, 1)


def flash_attention(q, k, v, causal=False, window_size=(-1, -1)):
    """What flash_attn_func computes: q (B, T, H, K); as its third version did at first, it returns lse too."""
    assert causal
    window = None if window_size[0] < 0 else window_size[0] + 1
    return reference.attention(*(t.transpose(1, 2) for t in (q, k, v)), window=window).transpose(1, 2), None


def test_adapters_hand_over_layouts_and_masks(case, monkeypatch):
    module = SimpleNamespace(flash_attn_func=flash_attention, flash_attn_varlen_func=packed_attention)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", packed_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(attention_peers, "FLEX_SHAPE", (2, 2, 40))
    q, k, v, do = case.make(CPU)
    right = exact(case, q, k, v, do)["o"]
    computed = set()
    for name in ("tilewright", "SDPA flash", "SDPA math", "torch varlen", "flex_attention", "flash-attn 2"):
        try:
            o = PEERS[name](case, CPU)(q, k, v)
        except Unsupported:
            continue
        assert error_of(o, right) <= TOLERANCE, name
        computed.add(name)
    plain = case.window is None and case.document_lengths is None
    assert computed == {"tilewright", "SDPA math", "flash-attn 2"} | ({"SDPA flash"} if plain else {"torch varlen"}) | (
        {"flex_attention"} if case.num_heads == case.num_kv_heads else set()
    )


def test_what_would_not_fit_is_left_out():
    long = AttentionCase(1, 16, 16, 65_536, 65_536, 128)
    with pytest.raises(Unsupported, match="its scores take 275 GB"):
        PEERS["SDPA math"](long, CPU)
    with pytest.raises(Unsupported, match="slow"):
        PEERS["SDPA efficient"](long, CPU)
    windowed = AttentionCase(1, 16, 16, 65_536, 65_536, 128, window=1024)
    with pytest.raises(Unsupported, match="mask has T x S"):
        PEERS["SDPA cuDNN"](windowed, CPU)


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(attention_peers, "MODULES", {"flash-attn 2": "no_such_module"})
    peers, missing = installed_peers()
    assert missing == {"flash-attn 2": "not installed: pip install no_such_module"}
    assert peers.keys() == PEERS.keys() - {"flash-attn 2"}


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    AttentionCase(2, 16, 16, 2048, 2048, 128), AttentionCase(2, 16, 2, 2048, 2048, 64), AttentionCase(4, 32, 4, 1, 4096, 128),
    AttentionCase(1, 16, 16, 2048, 2048, 128, window=256),
    AttentionCase(1, 16, 16, 2048, 2048, 128, document_lengths=draw_lengths(2048)),
], ids=lambda case: case.name)  # fmt: skip
def test_a_shape_is_measured_on_a_gpu(case):
    rows = list(bench_attention_case(case, installed_peers()[0], torch.device("cuda"), Ceilings(4.8e12, 1e15)))
    timed = {(row["variant"], row["case"].split()[-1]) for row in rows if "p50_ms" in row}
    assert timed >= {("tilewright", direction) for direction in case.costs}, rows
