"""Setup of the test suite. Without a GPU, kernels run in Triton's interpreter on CPU tensors."""

import gc
import importlib.util
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from huge import alone, is_huge, spread

# `python -m pytest` adds the repository root, whose folders, such as kernels, would shadow other packages of the same name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parents[1]]

HAS_GPU = torch.cuda.is_available()
GPU_TIMEOUT_S = 120
if not HAS_GPU:
    # Read when a kernel is defined, so it must be set before tilewright.kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from interpreter import patch_interpreter

        patch_interpreter()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with one thread per core each slow each other down, and so do Inductor's compilers, one per core too.
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Deterministic examples, without deadlines on slow machines.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = spread(items)
    # A kernel that hangs blocks the main thread in the driver, where no signal handler runs; a thread ends the process.
    limit = pytest.mark.timeout(GPU_TIMEOUT_S, method="thread")
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch.cuda finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(limit if HAS_GPU else skip)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Run one huge test at a time. This is the first hook, so the wait does not count for the time limit of the test."""
    with alone() if HAS_GPU and is_huge(item) else nullcontext():
        return (yield)


def end_if_broken(item):
    if not HAS_GPU or "gpu" not in item.keywords or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # The failure is reported already. pytest-xdist names this test and starts another process for the rest.
            os._exit(1)
        reason = f"{item.nodeid} broke the GPU's context: {str(error).splitlines()[0]}"
        pytest.exit(f"{reason}; with --numprocesses 1 the other tests would run", returncode=1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    """End the process after a test that broke the GPU's context: there, every later test would fail."""
    try:
        return (yield)
    finally:
        # Also after a fixture that failed because of it.
        end_if_broken(item)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def compile_afresh():
    """Reset torch.compile after each test: PyTorch allows eight variants of a function, counted over all tests."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def free_memory():
    # pytest keeps a failed test's exception, whose frames reference tensors.
    sys.last_value = sys.last_traceback = sys.last_exc = None
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def all_memory(request):
    """Free the GPU memory of earlier tests, and of a huge one at once.

    Other processes that run tests on this GPU need the memory that PyTorch caches.
    """
    uses_gpu = HAS_GPU and "gpu" in request.node.keywords
    if uses_gpu:
        free_memory()
    yield
    if uses_gpu and is_huge(request.node):
        with suppress(RuntimeError):  # of a broken context
            free_memory()
