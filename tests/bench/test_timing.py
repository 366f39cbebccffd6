import pytest
import torch

from tilewright.bench.timing import quantiles, time_variants


def test_quantiles_of_known_samples():
    times = quantiles([float(n) for n in range(101)])
    assert (times.p20_ms, times.p50_ms, times.p80_ms, times.count) == (20, 50, 80, 101)
    assert quantiles([3.0]).p80_ms == 3.0
    assert quantiles([4.0, 2.0]).p50_ms == pytest.approx(3.0)


def test_variants_run_in_turn():
    calls = []
    times = time_variants({name: lambda name=name: calls.append(name) for name in "ab"}, torch.device("cpu"), rounds=3, calls=2)
    assert "".join(calls) == "ab" + "aabb" * 3  # once to compile, then in turn
    assert times["a"].count == times["b"].count == 6


def test_a_failing_variant_does_not_stop_the_others():
    calls = []

    def failing():
        calls.append("b")
        if calls.count("b") == 3:
            raise RuntimeError("no memory")

    variants = {"a": lambda: calls.append("a"), "b": failing, "c": lambda: calls.append("c")}
    failed: dict[str, str] = {}
    times = time_variants(variants, torch.device("cpu"), rounds=3, failed=failed)
    assert "".join(calls) == "abc" + "abc" + "abc" + "ac"
    assert failed == {"b": "RuntimeError: no memory"}
    assert {name: one.count for name, one in times.items()} == {"a": 3, "c": 3}
    calls.clear()
    with pytest.raises(RuntimeError, match="no memory"):
        time_variants(variants, torch.device("cpu"), rounds=3)
