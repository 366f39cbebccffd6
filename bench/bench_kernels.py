"""Microbenchmarks of every op beside its peers: `pytest bench/bench_kernels.py --benchmark-compare`.

On a CPU the ops are those of PyTorch at small sizes, which says that the harness works and nothing more.
"""

# pytest imports this file by itself, so that its imports cannot be relative, which the type checker would resolve.
# pyright: reportMissingImports=false
from functools import cache

import pytest

from tilewright.bench.harness import CLOCK, here, measure
from tilewright.bench.jobs import clean_up
from tilewright.bench.kernels import prepare
from tilewright.bench.ops import OWN, Case, cases, small_cases

pytestmark = pytest.mark.benchmark(timer=CLOCK)


@cache
def _cases() -> dict[str, Case]:
    chosen = cases if here().type == "cuda" else small_cases
    return {case.name: case for group in ("own", "attention") for case in chosen(group)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each variant of each op at each shape, installed or not."""
    ids = [
        (name, way, variant) for name, case in _cases().items() for way in case.costs() for variant in case.forms({}, here())
    ]
    metafunc.parametrize(("name", "direction", "variant"), ids, ids=[", ".join(one) for one in ids])


def test_op(benchmark, name: str, direction: str, variant: str) -> None:
    """Time one variant of an op, once its results are right."""
    case, device = _cases()[name], here()
    if not case.is_timed(variant, direction):
        pytest.skip("its forward pass computes gradients too: it is timed both ways together")
    if variant in ("torch.compile", "flex_attention") and device.type != "cuda":
        pytest.skip("compiles C++ for a minute on a CPU")
    clean_up(device)
    benchmark.group = f"{name} {direction}"
    arguments = case.arguments(device)
    try:
        call, note = prepare(
            case.forms(arguments.options, device)[variant](), direction, arguments.positional, case.right(arguments)
        )
    except Exception as error:  # what a peer cannot do is no failure of ours
        if variant in (OWN, "torch"):
            raise
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    measure(benchmark, call, device)
    benchmark.extra_info["note"] = note
