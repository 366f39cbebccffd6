"""Setup of the test suite. Without a GPU, kernels run in Triton's interpreter on CPU tensors."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# `python -m pytest` adds the repository root, whose folders, such as kernels, would shadow other packages of the same name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parents[1]]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is defined, so it must be set before tilewright.kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from interpreter import patch_interpreter

        patch_interpreter()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with one thread per core each slow each other down.
    torch.set_num_threads(1)

# Deterministic examples, without deadlines on slow machines.
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
    """Reset torch.compile after each test: PyTorch allows eight variants of a function, counted over all tests."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def all_memory(request):
    """Free the GPU memory of a failed test: pytest keeps its exception, whose frames reference tensors."""
    if HAS_GPU and "gpu" in request.node.keywords:
        sys.last_value = sys.last_traceback = sys.last_exc = None
        gc.collect()
