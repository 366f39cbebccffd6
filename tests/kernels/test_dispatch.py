import warnings

import pytest
import torch

from tilewright.kernels import dispatch, get_backend, rms_norm, set_backend, use_backend


def test_auto_runs_reference_on_cpu():
    assert get_backend() == "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.use_triton(torch.zeros(1))


def test_use_backend_restores_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        assert get_backend() == "reference"
        raise RuntimeError("inside")
    assert get_backend() == "auto"


def test_unknown_backend_raises():
    with pytest.raises(ValueError, match="'cuda' is unknown: choose one of auto, triton, reference"):
        set_backend("cuda")  # pyright: ignore
    assert get_backend() == "auto"


@pytest.mark.parametrize(("has_triton", "message"), [(False, "package triton"), (True, "CUDA tensor")])
def test_forced_backend_that_cannot_run_raises(monkeypatch, has_triton, message):
    monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        rms_norm(torch.randn(2, 4), torch.ones(4))


def test_reference_runs_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert rms_norm(torch.randn(2, 4), torch.ones(4)).shape == (2, 4)
