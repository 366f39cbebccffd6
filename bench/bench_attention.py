"""Microbenchmarks of attention beside its peers: `pytest bench/bench_attention.py --benchmark-compare`.

On a CPU it is the reference at a small size, which says that the harness works and nothing more.
"""

# pytest imports this file by itself, so that its imports cannot be relative, which the type checker would resolve.
# pyright: reportMissingImports=false
import pytest

from tilewright.bench.attention import prepare
from tilewright.bench.attention_cases import AttentionCase, attention_cases, exact
from tilewright.bench.attention_peers import PEERS, installed_peers
from tilewright.bench.harness import CLOCK, here, measure
from tilewright.bench.jobs import clean_up

pytestmark = pytest.mark.benchmark(timer=CLOCK)
OWN = "tilewright"
SMALL = (AttentionCase(1, 2, 2, 64, 64, 16), AttentionCase(1, 2, 1, 1, 64, 16))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each peer at each shape, installed or not."""
    cases = list(attention_cases()) if here().type == "cuda" else SMALL
    ids = [(case, direction, peer) for case in cases for direction in case.costs for peer in PEERS]
    metafunc.parametrize(("case", "direction", "peer"), ids, ids=[f"{case.name}, {way}, {peer}" for case, way, peer in ids])


def test_attention(benchmark, case: AttentionCase, direction: str, peer: str) -> None:
    """Time one peer, once its results are right."""
    device = here()
    peers, missing = installed_peers()
    if peer in missing:
        pytest.skip(missing[peer])
    if peer == "flex_attention" and device.type != "cuda":
        pytest.skip("compiles C++ for a minute on a CPU")
    clean_up(device)
    inputs = case.make(device)
    benchmark.group = f"{case.name} {direction}"
    try:
        call = prepare(peers[peer](case, device), direction, inputs[:3], inputs[3], exact(case, *inputs))
    except Exception as error:  # what a peer cannot do is no failure of ours
        if peer == OWN:
            raise
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    measure(benchmark, call, device)
