"""Tests marked `huge`, of which several at once exceed the memory of any GPU, when several processes run the tests."""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def is_huge(item: Any) -> bool:
    """Return whether a test has the mark."""
    return item.get_closest_marker("huge") is not None


def spread(items: Sequence[Any]) -> list[Any]:
    """Return the tests with the huge ones at equal distances: neighbours would block all processes."""
    huge, others = [item for item in items if is_huge(item)], [item for item in items if not is_huge(item)]
    places = [((i + 0.5) / len(part), item) for part in (huge, others) for i, item in enumerate(part)]
    return [item for _, item in sorted(places, key=lambda place: place[0])]


@contextmanager
def alone() -> Iterator[None]:
    """Run a block after those of all other processes have ended. The end of a process ends its block."""
    with Path(__file__).open() as file:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
