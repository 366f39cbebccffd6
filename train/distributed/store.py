"""Access to the key-value store of torchrun."""

import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]


def torchrun_store(timeout: timedelta) -> Store | None:
    """Return torchrun's store, which its processes can use before they initialize a process group.

    Returns None if torchrun provides no store, or if the job has several machines.
    """
    several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if several or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
    # The store survives a restart and still holds the addresses of the old processes (PyTorch issue 135712), so the prefix
    # contains the restart count. The count is equal in all processes on one machine only.
    return PrefixStore(f"tilewright/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
