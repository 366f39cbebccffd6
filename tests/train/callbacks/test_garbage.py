import gc
from contextlib import closing
from types import SimpleNamespace

import pytest

from tilewright.train.callbacks.garbage import GarbageCollection


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with closing(GarbageCollection(SimpleNamespace(config=None))):
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if before else gc.disable)()
