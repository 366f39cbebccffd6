"""Microbenchmarks of the ops beside their peers: `pytest bench/bench_kernels.py --benchmark-compare`.

On a CPU the ops are those of PyTorch at small sizes, which says that the harness works and nothing more.
"""

# pytest imports this file by itself, so that its imports cannot be relative, which the type checker would resolve.
# pyright: reportMissingImports=false
from functools import cache

import pytest
import torch

from tilewright.bench.check import what_is_right
from tilewright.bench.harness import CLOCK, here, measure
from tilewright.bench.jobs import clean_up
from tilewright.bench.kernels import directions, prepare
from tilewright.bench.ops import OpCase, op_cases, small_cases

pytestmark = pytest.mark.benchmark(timer=CLOCK)


@cache
def _cases() -> dict[str, OpCase]:
    return {case.name: case for case in (op_cases if here().type == "cuda" else small_cases)()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each variant of each op at each shape, installed or not."""
    ids = [
        (name, direction, variant)
        for name, case in _cases().items()
        for direction in directions(case)
        for variant in (*case.variants, *case.missing)
    ]
    metafunc.parametrize(("name", "direction", "variant"), ids, ids=[", ".join(one) for one in ids])


def test_op(benchmark, name: str, direction: str, variant: str) -> None:
    """Time one variant of an op, once its results are right."""
    case, device = _cases()[name], here()
    if variant in case.missing:
        pytest.skip(case.missing[variant])
    if variant in case.fused and direction != "both":
        pytest.skip("its forward pass computes gradients too: it is timed both ways together")
    if variant == "torch.compile" and device.type != "cuda":
        pytest.skip("compiles C++ for a minute on a CPU")
    clean_up(device)
    torch.manual_seed(0)
    benchmark.group = f"{name} {direction}"
    try:
        inputs = case.make(device)
        right = what_is_right(case.oracle, case.variants["torch"], inputs)
        call, note = prepare(case, direction, variant, inputs, right)
    except Exception as error:  # what a peer cannot do is no failure of ours
        if variant in ("tilewright", "torch"):
            raise
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    measure(benchmark, call, device)
    benchmark.extra_info["note"] = note
