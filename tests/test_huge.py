import threading
from types import SimpleNamespace

from huge import alone, is_huge, spread


def item(name, *marks):
    return SimpleNamespace(name=name, get_closest_marker=lambda mark: mark if mark in marks else None)


def test_huge_tests_are_not_neighbours():
    items = [item("a", "gpu"), item("B", "huge"), item("C", "huge"), *map(item, "defgh")]
    assert [is_huge(each) for each in items[:3]] == [False, True, True]
    assert "".join(each.name for each in spread(items)) == "aBdefCgh"
    assert spread(items[:1]) == items[:1]
    assert spread([]) == []


def test_a_huge_test_waits_for_the_others():
    ended = []

    def wait():
        with alone():
            ended.append("second")

    # A lock belongs to an open file, so a thread stands for a process.
    thread = threading.Thread(target=wait)
    with alone():
        thread.start()
        thread.join(0.2)
        ended.append("first")
    thread.join(30)
    assert ended == ["first", "second"]
