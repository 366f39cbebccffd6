"""A pytest plugin, `-p null_gpu.plugin`, that runs GPU tests on the null GPU without comparing values.

The null GPU computes nothing, so the plugin compares only shapes, dtypes, devices and memory layouts. A test that checks values
itself ends at that line (`OF_VALUES`). A test fails if the null GPU reports a fault while the test or its fixtures run.
"""

import ctypes
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# Tests that check values or times themselves, and a part of the line at which they may end.
OF_VALUES = {
    "test_writer.py::test_snapshots_of_gpu_tensors_hold_the_values_at_the_save": '["w"].eq(step)',
    "test_attention_gpu.py::test_float32_is_exact_unless_tf32_is_asked_for": "assert error < ",
    "test_contract.py::test_more_elements_than_32_bits_count": "count_nonzero() > ",
    "test_cross_entropy.py::test_more_elements_than_31_bits_can_count": "losses[0].item() == ",
    "test_distributed.py::test_gradients_of_shards_equal_the_whole_model": "<= tolerance * expected.norm()",
    "test_doctor.py::test_it_runs_a_kernel_on_the_gpu": "assert shown.returncode == 0",
    "test_ceilings.py::test_ceilings_are_measured_on_a_gpu": "share_of_datasheet",
    "test_kernels.py::test_a_case_is_measured_on_a_gpu": "share_of_roofline",
    "test_training.py::test_training_and_memory_are_measured_on_a_gpu": 'row.get("measured")',
    "test_profile.py::test_a_profile_of_a_gpu_holds_kernels_only": 'groups["matmul"] > 0',
    "test_loop.py::test_a_gpu_run_learns_as_the_cpu_does": "result.valid_loss == ",
}
# Tests that cannot run, and the reason.
NOT_RUN = {
    "test_prefetch.py::test_next_does_not_synchronize_with_the_gpu": "the null GPU is never at work",
    "test_attention.py::test_a_shape_is_measured_on_a_gpu": "PyTorch crashes where cuDNN refuses attention twice, as here",
}
COMPARED = pytest.StashKey[bool]()
_running: list[pytest.Item] = []


def _compare(actual: Any, expected: Any, *, dtype: bool = True, device: bool = True, what: str = "result") -> None:
    if _running:
        _running[-1].stash[COMPARED] = True
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert not dtype or actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
        assert not device or actual.device == expected.device, f"{what}: on {actual.device}, expected on {expected.device}"
    elif isinstance(actual, Mapping) and isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), f"{what}: {sorted(actual)}, expected {sorted(expected)}"
        for name in actual:
            _compare(actual[name], expected[name], dtype=dtype, device=device, what=f"{what}[{name!r}]")
    elif isinstance(actual, Sequence) and isinstance(expected, Sequence) and not isinstance(actual, str):
        assert len(actual) == len(expected), f"{what}: {len(actual)}, expected {len(expected)}"
        for a, b in zip(actual, expected, strict=True):
            _compare(a, b, dtype=dtype, device=device, what=what)


def _assert_close(actual: Any, expected: Any, *, check_dtype: bool = True, check_device: bool = True, **_: Any) -> None:
    _compare(actual, expected, dtype=check_dtype, device=check_device)


def _equal(a: Tensor, b: Tensor) -> bool:
    _compare(a, b)
    return True


def _allclose(a: Tensor, b: Tensor, *_: Any, **__: Any) -> bool:
    return _equal(a, b)


def _assert_accurate(actual: Tensor, reference: Tensor, exact: Tensor, what: str = "result", slack: float = 0.0) -> None:
    _compare(actual, reference, what=what)
    _compare(actual, exact, dtype=False, what=what)
    # A result may have another layout than the reference, but no gaps and no repeated elements.
    dense = torch.ops.aten.is_non_overlapping_and_dense(actual)
    assert dense or actual.stride() == reference.stride(), f"{what}: strides {actual.stride()}, expected {reference.stride()}"


def _compare_cases(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], exact: Mapping[str, Tensor], slack: Mapping[str, float]
) -> None:
    for name, result in actual.items():
        _assert_accurate(result, expected[name], exact[name], what=name)


def _all(x: Tensor, *arguments: Any, **rest: Any) -> Tensor | bool:
    # `assert x.all()` in a test checks values. Calls from the project keep their result.
    if x.is_cuda and not arguments and not rest and "test_" in sys._getframe(1).f_code.co_filename.rsplit("/", 1)[-1]:
        _compare(None, None)
        return True
    return _own_all(x, *arguments, **rest)


_own_all = Tensor.all


def pytest_configure() -> None:
    """Replace the comparisons before test modules import them by name."""
    # If cuDNN makes no plan, as here, PyTorch dereferences a null pointer at the second call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.testing.assert_close, torch.equal, torch.allclose = _assert_close, _equal, _allclose
    Tensor.all = _all


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Replace the comparisons of the tests' helper modules, which need conftest.py to be imported first."""
    import oracle

    oracle.assert_accurate = _assert_accurate
    import attention_cases

    attention_cases.compare = _compare_cases


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that cannot run."""
    for item in items:
        if (reason := NOT_RUN.get(_name(item))) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _name(item: pytest.Item) -> str:
    return f"{item.path.name}::{getattr(item, 'originalname', '')}"


def _asks_for_values(item: pytest.Item, error: BaseException) -> bool:
    """Return whether the test failed at its line that checks values."""
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(item.path)]
    return _name(item) in OF_VALUES and OF_VALUES[_name(item)] in lines[-1]


@contextmanager
def _no_faults() -> Iterator[None]:
    count = ctypes.CDLL("libcuda.so.1").null_gpu_faults
    before = count()
    try:
        yield
    finally:
        if (faults := count() - before) > 0:
            pytest.fail(f"{faults} faults on the null GPU, printed on stderr", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Fail a test if the setup of its fixtures causes a fault."""
    with _no_faults():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Fail a test if the teardown of its fixtures causes a fault."""
    with _no_faults():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that causes a fault, xfail one that ends at its check of values, and restore the default stream."""
    _running.append(item)
    try:
        with _no_faults():
            yield
    # A row without a measured figure gives a KeyError.
    except (AssertionError, KeyError) as error:
        if not _asks_for_values(item, error):
            raise
        pytest.xfail("checks values")
    finally:
        _running.clear()
        if torch.cuda.is_initialized() and torch.cuda.current_stream() != torch.cuda.default_stream():
            torch.cuda.set_stream(torch.cuda.default_stream())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Record whether the test compared results, and free the tensors of a test that ended at its check of values."""
    report = yield
    if call.excinfo is not None and hasattr(report, "wasxfail"):
        traceback.clear_frames(call.excinfo.tb)
    if report.when == "call" and item.stash.get(COMPARED, False):
        report.user_properties.append(("compared", True))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests compared results."""
    reports = [r for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", "") == "call"]
    compared = sum(dict(report.user_properties).get("compared", False) for report in reports)
    of_values = len(terminalreporter.stats.get("xfailed", []))
    terminalreporter.section("null GPU")
    terminalreporter.line(
        f"{len(reports)} tests ran: {compared} compared shapes and dtypes instead of values, "
        f"{of_values} ended at their own check of values, the others check no values"
    )
