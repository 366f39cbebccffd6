"""GPU calls of a training step: after warmup it does not synchronize, allocate or load modules."""

import json
import os

import pytest

from null_gpu.steps import FILE, VARIANTS, measured, versions

pytestmark = pytest.mark.skipif(
    not os.environ.get("NULL_GPU"), reason="needs the null GPU: run tests/null_gpu/install.py and set NULL_GPU=1"
)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """The name of a variant and its counts."""
    return request.param, measured(request.param)


def test_every_step_has_the_same_counts(variant):
    assert "differ" not in variant[1]


def test_the_host_waits_only_in_a_step_that_logs(variant):
    _, counts = variant
    assert counts["step"].get("synchronisations", 0) == 0
    assert counts["step that logs"]["synchronisations"] > 0


@pytest.mark.parametrize("what", ["allocations", "modules", "faults", "launches: side", "launches: another device"])
def test_no_step_has(variant, what):
    assert all(counts.get(what, 0) == 0 for counts in (variant[1]["step"], variant[1]["step that logs"]))


def test_counts_equal_the_recorded_ones(variant):
    name, counts = variant
    recorded = json.loads(FILE.read_text())
    here = versions()
    if {each: recorded[each] for each in here} != here:
        pytest.skip(f"counted with {recorded['torch']} and Triton {recorded['triton']}, here are {here}")
    for step in ("step", "step that logs"):
        assert counts[step] == recorded["variants"][name][step], (
            "update the file with `python -m null_gpu.steps`, with tests/ in PYTHONPATH"
        )
