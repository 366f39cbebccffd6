import pytest
import torch

from tilewright.bench import ops
from tilewright.bench.kernels import Ceilings, bench_case
from tilewright.bench.ops import OpCase
from tilewright.kernels.costs import Cost

CEILINGS = Ceilings(copy=1e9, matmul=1e9)
COST = Cost(bytes=1000, flops=1000)


def case(**variants):
    return OpCase(
        "double 4x8", lambda device: (torch.randn(4, 8).bfloat16(),), {"torch": lambda x: x * 2, **variants}, COST, COST, COST
    )


def test_every_direction_of_every_variant_is_timed(device):
    rows = list(bench_case(case(other=lambda x: x + x), torch.device("cpu"), CEILINGS))
    assert {(row["case"], row["variant"]) for row in rows} == {
        (f"double 4x8 {direction}", variant) for direction in ("forward", "backward", "both") for variant in ("torch", "other")
    }
    for row in rows:
        seconds = row["p50_ms"] * 1e-3
        assert row["gb_per_s"] == pytest.approx(1e-6 / seconds)
        assert row["share_of_roofline"] == pytest.approx(1e-6 / seconds)


def test_a_wrong_or_failing_variant_is_named_instead_of_timed():
    def failing(x):
        raise RuntimeError("no such shape")

    rows = list(bench_case(case(wrong=lambda x: x * 2.1, failing=failing), torch.device("cpu"), CEILINGS))
    reasons = {row["variant"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert reasons == {"wrong": "more than twice PyTorch's error", "failing": "RuntimeError: no such shape"}
    assert {row["variant"] for row in rows if "p50_ms" in row} == {"torch"}


def test_a_result_above_the_ceiling_is_flagged():
    rows = list(bench_case(case(), torch.device("cpu"), Ceilings(copy=1e3, matmul=1e3)))
    assert all(row["suspicious"] == "above the ceiling" for row in rows)


def test_every_case_can_be_made_and_agrees_with_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ops, "TOKENS", 32)
    small = [
        ops._rms_norm(40),
        ops._add_rms_norm(40),
        ops._swiglu(24),
        ops._rope(4, 2, 8, context=16),
        ops._cross_entropy(50, rows=8),
        ops._linear_cross_entropy(16, 50, rows=8),
    ]
    for made in small:
        rows = list(bench_case(made, torch.device("cpu"), CEILINGS))
        assert {row["variant"] for row in rows if "p50_ms" in row} >= {"tilewright", "torch", "torch.compile"}, rows


@pytest.mark.gpu
def test_a_case_is_measured_on_a_gpu():
    rows = list(bench_case(ops._rms_norm(1024), torch.device("cuda"), Ceilings(4.8e12, 1e15)))
    assert {row["variant"] for row in rows} >= {"tilewright", "torch", "torch.compile"}
    assert all(0 < row["share_of_roofline"] <= 1 for row in rows)
