import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tilewright.bench import ops, peers
from tilewright.bench.ceilings import Ceilings
from tilewright.bench.kernels import bench_case, kernel_jobs
from tilewright.bench.ops import OpCase
from tilewright.kernels import reference
from tilewright.kernels.costs import Cost

CEILINGS = Ceilings(copy=1e9, matmul=1e9)
COST = Cost(bytes=1000, flops=1000)


def case(missing=(), **variants):
    own = {"torch": lambda x: x * 2, **variants}
    return OpCase(
        "double 4x8",
        lambda device: (torch.randn(4, 8).bfloat16(),),
        own,
        lambda x: x * 2,
        COST,
        COST,
        COST,
        (),
        dict(missing),
        8,
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
        assert (row["op"], row["size"]) == (row["case"].replace(" 4x8", ""), 8)
        assert row["ready_s"] > 0


def test_a_wrong_or_failing_variant_is_named_instead_of_timed():
    def failing(x):
        raise RuntimeError("no such shape")

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * torch.nan

    variants = {"wrong": lambda x: x * 3, "nan": lambda x: x * torch.nan, "failing": failing}
    variants["wrong gradient"] = WrongGradient.apply
    rows = list(bench_case(case({"peer": "not installed"}, **variants), torch.device("cpu"), CEILINGS))
    reasons = {row["variant"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert reasons == {
        "peer": "not installed",
        "wrong": reasons["wrong"],
        "nan": reasons["nan"],
        "wrong gradient": reasons["wrong gradient"],
        "failing": "RuntimeError: no such shape",
    }
    off = r"is off by \S+ times what rounding explains, where values are up to"
    assert re.match(f"wrong: result 0 {off}", reasons["wrong"])
    assert reasons["nan"].startswith("wrong: result 0 is off by nan times")
    assert re.match(f"wrong: gradient 0 {off}", reasons["wrong gradient"])
    timed = {(row["variant"], row["case"].split()[-1]) for row in rows if "p50_ms" in row}
    assert timed == {("torch", "forward"), ("torch", "backward"), ("torch", "both"), ("wrong gradient", "forward")}


def test_a_variant_that_is_less_exact_than_rounding_is_timed_with_a_note():
    rows = list(bench_case(case(rounded=lambda x: x * 2 * 1.02), torch.device("cpu"), Ceilings(1e12, 1e12)))
    notes = {row["variant"]: row.get("suspicious") for row in rows if row["case"].endswith("both")}
    assert notes["torch"] is None
    assert re.match(r"result 0 is off by [\d.]+ times .*; gradient 0 is off by", notes["rounded"])


def test_a_variant_that_fails_while_it_is_timed_is_named():
    calls = []

    def tiring(x):
        calls.append(1)
        if len(calls) == 4:
            raise torch.cuda.OutOfMemoryError("of late")
        return x * 2

    rows = list(bench_case(case(tiring=tiring), torch.device("cpu"), CEILINGS))
    assert [row for row in rows if "not_measured" in row] == [
        {"case": "double 4x8 forward", "variant": "tiring", "not_measured": "OutOfMemoryError: of late"}
    ]
    assert sum(row["variant"] == "torch" for row in rows) == 3


def test_a_result_above_the_ceiling_is_flagged():
    rows = list(bench_case(case(), torch.device("cpu"), Ceilings(copy=1e3, matmul=1e3)))
    assert all(row["suspicious"] == "above the ceiling" for row in rows)


def test_every_case_can_be_made_and_agrees_with_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for made in ops.small_cases():
        rows = list(bench_case(made, torch.device("cpu"), CEILINGS))
        assert {row["variant"] for row in rows if "p50_ms" in row} >= {"tilewright", "torch", "torch.compile"}, rows
        named = {row["variant"]: row["not_measured"] for row in rows if "p50_ms" not in row}
        assert all(named[peer] == reason for peer, reason in made.missing.items())


def test_a_bench_whose_time_ends_has_seen_every_op():
    cases = list(ops.op_cases())
    names = [case.op for case in cases]
    assert set(names[:6]) == set(names) == {case.op for case in ops.small_cases()}
    assert len({case.name for case in cases}) == len(cases)
    assert [job.case for job in kernel_jobs(torch.device("cpu"), CEILINGS)] == [case.name for case in cases]


def test_a_peer_that_is_not_there_is_named_with_its_remedy(monkeypatch):
    assert peers.find("no_such_peer").reason == "not installed: pip install no_such_peer"
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace())
    peers.find.cache_clear()
    assert peers.find("quack", "rmsnorm").reason.startswith("AttributeError")
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=abs))
    peers.find.cache_clear()
    assert peers.find("quack", "rmsnorm") is abs
    assert peers.adapt(abs, lambda peer: peer) is abs
    peers.find.cache_clear()


def rmsnorm(x, weight, residual=None, eps=1e-6, prenorm=False):
    """What quack's function computes."""
    if residual is None:
        return reference.rms_norm(x, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def test_the_adapters_of_quack(monkeypatch):
    def cross_entropy(x, target):
        return reference.cross_entropy(x, target)

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=rmsnorm, cross_entropy=cross_entropy))
    peers.find.cache_clear()
    adapted = [case for case in ops.small_cases() if "quack" in case.variants]
    peers.find.cache_clear()
    assert [case.op for case in adapted] == ["rms_norm", "add_rms_norm", "cross_entropy"]
    for made in adapted:
        rows = [row for row in bench_case(made, torch.device("cpu"), CEILINGS) if row["variant"] == "quack"]
        assert len(rows) == 3
        assert all("p50_ms" in row for row in rows), rows


@pytest.mark.gpu
def test_a_case_is_measured_on_a_gpu():
    rows = list(bench_case(ops._rms_norm(1024), torch.device("cuda"), Ceilings(4.8e12, 1e15)))
    assert {row["variant"] for row in rows} >= {"tilewright", "torch", "torch.compile"}
    assert all(0 < row["share_of_roofline"] <= 1 for row in rows)
