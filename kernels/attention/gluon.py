"""Import Gluon, Triton's language with explicit layouts, barriers and warp groups, or stand-ins if Triton is not installed."""

from types import SimpleNamespace
from typing import Any

from ..dispatch import HAS_TRITON, jit

gl: Any
gluon: Any
mbarrier: Any
tma: Any
fence_async_shared: Any
warpgroup_mma: Any
warpgroup_mma_wait: Any

if HAS_TRITON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
else:
    # Enough to define a kernel, but not to launch it.
    gl, gluon = SimpleNamespace(), SimpleNamespace(jit=jit)
    mbarrier = tma = fence_async_shared = warpgroup_mma = warpgroup_mma_wait = None
