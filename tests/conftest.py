"""Set-up for the whole suite: without a GPU, kernels run in Triton's interpreter on CPU tensors."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# `python -m pytest` adds the root, whose folders would hide the packages of others that have their names, such as kernels.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parents[1]]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is defined, so it must be set before tilewright.kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from interpreter import patch_index, patch_once_a_launch

        patch_once_a_launch()
        patch_index()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes that each keep every core spinning slow each other down manifold.
    torch.set_num_threads(1)

# The same examples on every machine, however slow it is.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch.cuda finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def compile_afresh():
    """Forget what a test compiled: PyTorch refuses the ninth variant of a function, whichever tests made the others."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def all_memory(request):
    """Free what a failed test on the GPU held: pytest keeps its exception, whose frames refer to their tensors."""
    if HAS_GPU and "gpu" in request.node.keywords:
        sys.last_value = sys.last_traceback = sys.last_exc = None
        gc.collect()
