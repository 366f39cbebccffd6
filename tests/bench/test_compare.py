import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tilewright.bench.compare import CompareConfig, compare, run_compare, verdict
from tilewright.bench.results import Run
from tilewright.cli import main
from tilewright.errors import UserError


def row(case, low, middle, high, count=20, variant="tilewright", **rest):
    times = {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "count": count}
    return {"stage": "kernels", "case": case, "variant": variant, **times, **rest}


def run(*rows, device="NVIDIA H200", tmp_path=None, name="run.jsonl"):
    machine = {"stage": "machine", "device": device, "date": "2026-01-01T00:00:00+00:00"}
    path = None if tmp_path is None else tmp_path / name
    if path is not None:
        path.write_text("".join(json.dumps(each) + "\n" for each in (machine, *rows)))
    return Run(path, machine, rows)


def verdict_of(before, after, threshold=0.05):
    (change,), _, _ = compare(run(before), run(after), threshold)
    return change.verdict


def test_verdicts_by_interval():
    before = row("a", 0.99, 1.0, 1.01)
    assert verdict_of(before, row("a", 1.98, 2.0, 2.02)) == "slower"
    assert verdict_of(before, row("a", 0.49, 0.5, 0.51)) == "faster"
    assert verdict_of(before, row("a", 0.99, 1.0, 1.01)) == "same"
    # The median is slower, but the intervals touch.
    assert verdict_of(before, row("a", 1.0, 1.2, 1.4)) == "ambiguous"
    assert verdict_of(row("a", 0.5, 1.0, 2.0), row("a", 0.5, 1.0, 2.0)) == "ambiguous"
    # A change within the threshold is the same, however precise the times.
    assert verdict_of(before, row("a", 1.02, 1.03, 1.03), threshold=0.1) == "same"


def test_a_single_sample_proves_no_change():
    before = row("a", 1.0, 1.0, 1.0, count=1)
    assert verdict_of(before, row("a", 3.0, 3.0, 3.0, count=1)) == "ambiguous"
    assert verdict_of(before, row("a", 1.0, 1.0, 1.0, count=1)) == "same"


def test_rows_without_quantiles_or_times():
    before = {"stage": "tokenizer", "case": "first calls", "variant": "cached", "p50_ms": 700.0, "count": 1}
    assert verdict_of(before, before) == "same"
    unmeasured = {"stage": "kernels", "case": "b", "variant": "torch", "not_measured": "no NVIDIA GPU"}
    inspected = {"stage": "inspect", "case": "c", "variant": "sm_90", "registers": 100}
    changes, only_before, only_after = compare(run(row("a", 1, 1, 1), unmeasured, inspected), run(row("b", 1, 1, 1)))
    assert changes == []
    assert (only_before, only_after) == ([("kernels", "a", "tilewright")], [("kernels", "b", "tilewright")])


times = st.floats(1e-3, 1e3)


@given(low=times, high=times, threshold=st.floats(0, 0.9))
def test_swapping_the_runs_swaps_the_verdict(low, high, threshold):
    low, high = sorted((low, high))
    opposite = {"faster": "slower", "slower": "faster"}
    found = verdict(low, high, threshold)
    # Rounding can differ for a bound on the threshold itself.
    assert verdict(1 / high, 1 / low, threshold) in (opposite.get(found, found), "same", "ambiguous")
    assert found != "faster" or high < 1
    assert found != "slower" or low > 1


def test_the_command_fails_if_a_case_is_slower(tmp_path, capsys):
    run(row("a", 0.99, 1.0, 1.01), row("gone", 1, 1, 1), tmp_path=tmp_path, name="before")
    run(row("a", 1.98, 2.0, 2.02), row("new", 1, 1, 1), tmp_path=tmp_path, name="after")
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    with pytest.raises(SystemExit) as exit:
        main(["bench", "compare", before, after])
    assert exit.value.code == 1
    shown = capsys.readouterr().out
    assert "2.000 (1.960 to 2.040)" in shown
    assert "1 slower" in shown
    assert f"only in {before}: kernels, gone, tilewright" in shown.replace("\n", "")
    assert f"only in {after}: kernels, new, tilewright" in shown.replace("\n", "")
    assert main(["bench", "compare", after, before]) == 0
    assert main(["bench", "compare", before, after, "--threshold", "0.99"]) == 0


def test_different_machines_and_disjoint_cases_are_reported(tmp_path, capsys):
    run(row("a", 1, 1, 1), tmp_path=tmp_path, name="gpu")
    run(row("a", 1, 1, 1), tmp_path=tmp_path, name="cpu", device="a CPU")
    assert not run_compare(CompareConfig(tmp_path / "gpu", tmp_path / "cpu"), Console(width=200))
    assert "the runs are from different machines: NVIDIA H200 and a CPU" in capsys.readouterr().out
    run(row("b", 1, 1, 1), tmp_path=tmp_path, name="other")
    with pytest.raises(UserError, match="have no timed case in common"):
        run_compare(CompareConfig(tmp_path / "gpu", tmp_path / "other"))
    with pytest.raises(UserError, match=r"threshold is 1\.0"):
        CompareConfig(tmp_path, tmp_path, threshold=1.0)
