"""When compiled code takes over: what is asked, what is compiled, what it costs."""

import sys
import threading

import pytest

from tilewright.tokenizer.compiled import jit, work


@pytest.fixture
def example(monkeypatch, real_decision):
    """A kind of work at 100 units a second that compiles for 5 s, and the names of what was loaded for it."""
    loaded = []

    def load(functions, what, seconds):
        loaded.append(([each.name for each in functions], what, seconds))

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(work.store, "is_kept", lambda name: False)
    monkeypatch.setitem(sys.modules, "numba", sys)
    function = jit.Compiled(lambda: None, ())
    function.module, function.__name__ = "a.room", "scan"
    monkeypatch.setattr(jit, "ALL", [function])
    return work.Work("scanner", [function], units_per_second=100, compile_seconds=5), loaded


def test_little_work_compiles_nothing(example):
    some, loaded = example
    assert not some.is_compiled(400)
    assert not loaded


def test_much_work_compiles_before_it_begins(example):
    some, loaded = example
    assert some.is_compiled(10_000)
    assert loaded == [(["room.scan"], "the tokenizer's scanner", 5)]
    assert some.is_compiled(0)
    assert len(loaded) == 1


def test_many_little_works_add_up(example):
    some, loaded = example
    answers = [some.is_compiled(1) for _ in range(600)]
    assert answers.index(True) == round(100 * (5 + work._LOAD))
    assert all(answers[answers.index(True) :])
    assert len(loaded) == 1


def test_code_that_is_kept_costs_little(example, monkeypatch):
    some, _ = example
    monkeypatch.setattr(work.store, "is_kept", lambda name: name == "room.scan")
    assert not some.is_compiled(9)
    assert some.is_compiled(9)


def test_the_import_of_numba_has_its_price(example, monkeypatch):
    some, _ = example
    monkeypatch.setattr(work.store, "is_kept", lambda name: True)
    monkeypatch.delitem(sys.modules, "numba")
    assert not some.is_compiled(50)
    assert some.is_compiled(50)


def test_what_is_loaded_costs_nothing(example):
    some, _ = example
    jit.ALL[0].entry = len
    assert not some.is_compiled(0)
    assert some.is_compiled(1)


def test_threads_may_ask(example):
    some, loaded = example
    counts = []

    def ask():
        counts.append([some.is_compiled(1) for _ in range(300)].count(False))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == round(100 * (5 + work._LOAD))
    assert loaded
