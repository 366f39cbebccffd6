"""The decision between plain Python and compiled code, and its cost model."""

import sys
import threading

import pytest

from tilewright.tokenizer.compiled import jit, work


@pytest.fixture
def example(monkeypatch, real_decision):
    """A kind of work with 100 units per second and 5 s to compile, and the names of the functions loaded for it."""
    loaded = []

    def load(functions, what, seconds):
        loaded.append(([each.name for each in functions], what, seconds))

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(work.store, "is_cached", lambda name: False)
    monkeypatch.setitem(sys.modules, "numba", sys)
    function = jit.Compiled(lambda: None, ())
    function.module, function.__name__ = "a.module", "scan"
    monkeypatch.setattr(jit, "ALL", [function])
    return work.Work("scanner", [function], units_per_second=100, compile_seconds=5), loaded


def test_little_work_compiles_nothing(example):
    example_work, loaded = example
    assert not example_work.is_compiled(400)
    assert not loaded


def test_much_work_compiles_at_once(example):
    example_work, loaded = example
    assert example_work.is_compiled(10_000)
    assert loaded == [(["module.scan"], "the tokenizer's scanner", 5)]
    assert example_work.is_compiled(0)
    assert len(loaded) == 1


def test_small_amounts_of_work_add_up(example):
    example_work, loaded = example
    answers = [example_work.is_compiled(1) for _ in range(600)]
    assert answers.index(True) == round(100 * (5 + work._LOAD))
    assert all(answers[answers.index(True) :])
    assert len(loaded) == 1


def test_cached_code_costs_little(example, monkeypatch):
    example_work, _ = example
    monkeypatch.setattr(work.store, "is_cached", lambda name: name == "module.scan")
    assert not example_work.is_compiled(9)
    assert example_work.is_compiled(9)


def test_the_import_of_numba_is_part_of_the_cost(example, monkeypatch):
    example_work, _ = example
    monkeypatch.setattr(work.store, "is_cached", lambda name: True)
    monkeypatch.delitem(sys.modules, "numba")
    assert not example_work.is_compiled(50)
    assert example_work.is_compiled(50)


def test_loaded_code_costs_nothing(example):
    example_work, _ = example
    jit.ALL[0].entry = len
    assert not example_work.is_compiled(0)
    assert example_work.is_compiled(1)


def test_is_compiled_is_thread_safe(example):
    example_work, loaded = example
    counts = []

    def ask():
        counts.append([example_work.is_compiled(1) for _ in range(300)].count(False))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == round(100 * (5 + work._LOAD))
    assert loaded
