import gc
import re
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilewright.bench import kernels, ops, peers
from tilewright.bench.ceilings import Ceilings
from tilewright.bench.kernels import bench_case, kernel_jobs
from tilewright.bench.ops import Case, cases, small_cases
from tilewright.bench.peers import Unsupported
from tilewright.kernels import inspect, reference
from tilewright.kernels.inspect import KernelCase
from tilewright.kernels.op import ALL, Arguments, Cost, Costs, Op, draw

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, matmul=1e9)
COST = Cost(bytes=1000, flops=1000)


def double(x):
    """Return 2 x."""
    return x * 2


DOUBLE = Op(
    function=double,
    reference=double,
    kernels=(),
    arguments=lambda device, dtype, rows, width: Arguments((draw(device, dtype, rows, width),), {}),
    cost=lambda itemsize, rows, width: Costs.of(COST, COST),
    shapes=(),
    examples=(),
    compiled=(),
    over="width",
)


@dataclass(frozen=True)
class Doubled(Case):
    """A case with given peers."""

    others: dict[str, Any] = field(default_factory=dict)

    def forms(self, options, device):
        """Return PyTorch's implementation and the peers."""

        def missing(reason):
            raise Unsupported(reason)

        forms = {"torch": lambda: double}
        for name, peer in self.others.items():
            forms[name] = (lambda peer=peer: missing(peer)) if isinstance(peer, str) else (lambda peer=peer: peer)
        return forms


def case(**others):
    return Doubled(DOUBLE, {"rows": 4, "width": 8}, others)


def test_every_direction_of_every_variant_is_timed(device):
    rows = list(bench_case(case(other=lambda x: x + x), CPU, CEILINGS))
    named = {(row["case"].removeprefix("double rows 4 width 8 "), row["variant"]) for row in rows}
    assert named == {(way, variant) for way in ("forward", "backward", "both") for variant in ("torch", "other")}
    for row in rows:
        seconds = row["p50_ms"] * 1e-3
        bytes = 2000 if row["case"].endswith("both") else 1000
        assert row["gb_per_s"] == pytest.approx(bytes * 1e-9 / seconds)
        assert row["share_of_roofline"] == pytest.approx(bytes * 1e-9 / seconds)
        assert (row["op"], row["size"]) == (row["case"].replace(" rows 4 width 8", ""), 8)
        assert row["ready_s"] > 0


def test_wrong_and_failing_variants_are_reported_instead_of_timed():
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
    rows = list(bench_case(case(peer="not installed", **variants), CPU, CEILINGS))
    reasons = {row["variant"]: row["not_measured"] for row in rows if "not_measured" in row}
    assert reasons == {
        "peer": "not installed",
        "wrong": reasons["wrong"],
        "nan": reasons["nan"],
        "wrong gradient": reasons["wrong gradient"],
        "failing": "RuntimeError: no such shape",
    }
    note = r"is \S+ times the tolerance, for values up to"
    assert re.match(f"wrong: error of result 0 {note}", reasons["wrong"])
    assert reasons["nan"].startswith("wrong: error of result 0 is nan times")
    assert re.match(f"wrong: error of gradient 0 {note}", reasons["wrong gradient"])
    timed = {(row["variant"], row["case"].split()[-1]) for row in rows if "p50_ms" in row}
    assert timed == {("torch", "forward"), ("torch", "backward"), ("torch", "both"), ("wrong gradient", "forward")}


def test_inexact_variants_are_timed_with_a_note():
    rows = list(bench_case(case(rounded=lambda x: x * 2 * 1.02), CPU, Ceilings(1e12, 1e12)))
    notes = {row["variant"]: row.get("suspicious") for row in rows if row["case"].endswith("both")}
    assert notes["torch"] is None
    assert re.match(r"error of result 0 is [\d.]+ times .*; error of gradient 0 is", notes["rounded"])


def test_variants_that_fail_during_timing_are_reported():
    calls = []

    def tiring(x):
        calls.append(1)
        if len(calls) == 4:
            raise torch.cuda.OutOfMemoryError("of late")
        return x * 2

    rows = list(bench_case(case(tiring=tiring), CPU, CEILINGS))
    assert [row for row in rows if "not_measured" in row] == [
        {"case": "double rows 4 width 8 forward", "variant": "tiring", "not_measured": "OutOfMemoryError: of late"}
    ]
    assert sum(row["variant"] == "torch" for row in rows) == 3


def test_a_result_above_the_ceiling_is_flagged():
    rows = list(bench_case(case(), CPU, Ceilings(copy=1e3, matmul=1e3)))
    assert all(row["suspicious"] == "above the ceiling" for row in rows)


@pytest.mark.parametrize("small", [*small_cases("own"), *small_cases("attention")], ids=lambda case: case.name)
def test_every_op_is_measured_with_pytorch(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = list(bench_case(small, CPU, CEILINGS))
    timed = {row["variant"] for row in rows if "p50_ms" in row}
    peers = {"SDPA math"} if small.op.group == "attention" else {"torch", "torch.compile"}
    assert timed >= {"tilewright"} | peers, rows


@pytest.mark.parametrize("group", ["own", "attention"])
def test_the_first_cases_cover_every_op(group):
    found = list(cases(group))
    names = [case.op.name for case in found]
    first = len(set(names))
    assert set(names[:first]) == set(names) == {name for name, op in ALL.items() if op.group == group}
    assert len({case.name for case in found}) == len(found)
    assert [job.case for job in kernel_jobs(group, CPU, CEILINGS)] == [case.name for case in found]


def test_kernels_are_compiled_before_the_first_case(monkeypatch):
    for capability, first in (((9, 0), "compile own"), ((8, 9), next(cases("own")).name)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert next(kernel_jobs("own", torch.device("cuda"), CEILINGS)).case == first

    def compile_case(case, architecture):
        compiled.append((case, architecture))
        if len(compiled) == 1:
            raise RuntimeError("a kernel that does not compile")

    def launches(op, sizes, architecture):
        return [KernelCase(op.label(sizes), ("attention", sizes["head_dim"]), (), (), ())]

    compiled = []
    monkeypatch.setattr(kernels, "compile_case", compile_case)
    monkeypatch.setattr(inspect, "launches", launches)
    # Each kernel once, not for each of its shapes and forms.
    (row,) = kernels.compile_kernels("attention", "sm_90")
    assert row["compilations"] == 3
    assert {(case.kernel, architecture) for case, architecture in compiled} == {
        (("attention", head_dim), "sm_90") for head_dim in (64, 128, 256)
    }


def test_products_in_fp8_are_compared_with_products_in_fp8():
    one = Case(ALL["fp8_linear"], ALL["fp8_linear"].examples[0])
    rows = list(bench_case(one, CPU, Ceilings(copy=1e30, matmul=1e9, fp8=3e9)))
    row = next(row for row in rows if row["variant"] == "tilewright")
    assert row["share_of_matmul"] == pytest.approx(row["tflop_per_s"] * 1e12 / 3e9)


def test_missing_peers_are_reported_with_a_remedy(monkeypatch):
    with pytest.raises(Unsupported, match="not installed: pip install no_such_peer"):
        peers.find("no_such_peer")
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace())
    peers._find.cache_clear()
    with pytest.raises(Unsupported, match="AttributeError"):
        peers.find("quack", "rmsnorm")
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=abs))
    peers._find.cache_clear()
    assert peers.find("quack", "rmsnorm") is abs
    peers._find.cache_clear()


def test_a_missing_peer_keeps_nothing_of_its_caller():
    """Its exception has a traceback, whose frames hold the tensors of a case."""

    def fail():
        held = torch.zeros(1)
        references.append(weakref.ref(held))
        peers.find("no_such_peer")

    references = []
    for _ in range(2):
        with suppress(Unsupported):
            fail()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def rmsnorm(x, weight, residual=None, eps=1e-6, prenorm=False):
    """Compute quack's rmsnorm with the reference."""
    if residual is None:
        return reference.rms_norm(x, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def test_quack_adapters(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    quack = SimpleNamespace(rmsnorm=rmsnorm, cross_entropy=lambda x, target: reference.cross_entropy(x, target))
    monkeypatch.setitem(sys.modules, "quack", quack)
    peers._find.cache_clear()
    for small in (Case(ALL[name], ALL[name].examples[0]) for name in ("rms_norm", "add_rms_norm", "cross_entropy")):
        rows = [row for row in bench_case(small, CPU, CEILINGS) if row["variant"] == "quack"]
        assert len(rows) == 3
        assert all("p50_ms" in row for row in rows), rows
    peers._find.cache_clear()


def test_peers_with_early_gradients_are_timed_only_both_ways():
    swiglu = Case(ALL["swiglu"], ALL["swiglu"].examples[0])
    assert [way for way in swiglu.costs() if swiglu.is_timed("liger", way)] == ["both"]
    assert [way for way in swiglu.costs() if swiglu.is_timed("torch", way)] == ["forward", "backward", "both"]
    assert list(Case(ALL["linear_cross_entropy"], ALL["linear_cross_entropy"].shapes[0]).costs()) == ["both"]


@pytest.mark.gpu
@pytest.mark.parametrize("op", [op for op in ALL.values() if op.group == "own"], ids=lambda op: op.name)
def test_a_case_is_measured_on_a_gpu(op):
    # The float64 results of the largest shape take 70 GB, and other processes run tests on this GPU.
    smallest = min(op.shapes, key=lambda sizes: sum(cost.bytes for cost in op.cost(2, **sizes) if cost is not None))
    rows = list(bench_case(ops.Case(op, smallest), torch.device("cuda"), Ceilings(4.8e12, 1e15)))
    ours = [row for row in rows if row["variant"] in ("tilewright", "torch", "torch.compile")]
    assert {row["variant"] for row in ours} == {"tilewright", "torch", "torch.compile"}
    # The L2 cache can hold a part of what a forward pass wrote.
    assert all(0 < row["share_of_roofline"] <= 1.1 for row in ours), ours
