import gc
from contextlib import closing
from types import SimpleNamespace

import pytest

from tilewright.train.callbacks.garbage import GarbageCollection


@pytest.fixture(autouse=True)
def short_runs():
    """Override the fixture of all training tests, because unfreezing is tested here."""
    gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_state_is_restored(enabled):
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
