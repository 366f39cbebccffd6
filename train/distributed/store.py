"""The store of torchrun, to which its processes have access before they have found each other."""

import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]


def torchrun_store(timeout: timedelta) -> Store | None:
    """Return the store of torchrun, to which all its processes have access before they have found each other.

    None where it has none of its own, or several machines take part.
    """
    several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if several or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
    # It outlives a restart, with the addresses of processes that are gone (PyTorch issue 135712). Only on one machine does this
    # count say the same to all.
    return PrefixStore(f"tilewright/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
